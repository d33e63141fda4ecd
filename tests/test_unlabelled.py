"""Schemes without labels, or without data: what each piece computes, and how a pair of models sets a number."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from test_schemes import same, scramble
from torch import nn

import kdkernels
from kdkernels import schemes


def test_semi_supervised_is_its_two_terms(generator):
    z, t = (torch.randn(6, 4, generator=generator) for _ in range(2))
    t += torch.tensor([9.0, 0, 0, 0]) * torch.tensor([1.0, 1, 0, 1, 0, 0])[:, None]  # of which it is sure
    t[2::3] *= 0.1  # and of which not
    z.requires_grad_()
    t.requires_grad_()
    y = torch.tensor([0, -100, 3, -100, -100, 1])
    p = t.detach().softmax(1)
    sure = p.amax(1) >= 0.7
    assert 0 < sure.sum() < 6
    rows = F.kl_div((z / 2).log_softmax(1), (t.detach() / 2).softmax(1), reduction="none").sum(1) * 4
    hard = F.cross_entropy(z, y, ignore_index=-100)
    for options, soft in (
        ({}, rows.mean()),
        ({"threshold": 0.7}, (rows * sure).sum() / 6),
        ({"threshold": 0.7, "pseudo_labels": True}, (F.cross_entropy(z, p.argmax(1), reduction="none") * sure).sum() / 6),
        ({"threshold": 1.0, "pseudo_labels": True}, 0 * z.sum()),
    ):  # fmt: skip
        got = schemes.semi_supervised_loss(z, t, y, weight=3.0, temperature=2.0, **options)
        torch.testing.assert_close(got, hard + 3 * soft)
        torch.testing.assert_close(
            torch.autograd.grad(got, z)[0], torch.autograd.grad(hard + 3 * soft, z, retain_graph=True)[0]
        )
    unsure = torch.zeros(6, 2)  # its largest probabilities are 0.5, and a threshold may be reached exactly
    assert schemes.semi_supervised_loss(z[:, :2], unsure, torch.full_like(y, -100), threshold=0.5) > 0
    got = schemes.semi_supervised_loss(z, t, torch.full_like(y, -100))
    torch.testing.assert_close(got, kdkernels.kl_div(z, t.detach()))
    got.backward()
    assert t.grad is None
    for bad in ({"threshold": 1.5}, {"weight": -1.0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            schemes.semi_supervised_loss(z, t, y, **bad)


def test_synthetic_batches_are_what_the_teacher_takes_for_the_classes(generator):
    teacher, student = (nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4))
                        for _ in range(2))  # fmt: skip
    for model in (teacher, student):
        scramble(model, generator)
    before = copy.deepcopy(teacher)
    start, wanted = torch.rand(8, 1, 5, 5, generator=generator), torch.arange(8) % 4
    kept = start.clone()

    def far(x: torch.Tensor) -> float:
        norm, maps = teacher[1], teacher[0](x)
        variance, mean = torch.var_mean(maps, (0, 2, 3), correction=0)
        return float(
            ((mean - norm.running_mean).square().sum() + (variance - norm.running_var).square().sum()).detach()
        )

    made = schemes.synthetic_batch(teacher, start, wanted, steps=60, bounds=(0.0, 1.0), student=student, smoothness=0.1)
    assert torch.equal(start, kept) and not made.requires_grad
    assert made.min() >= 0 and made.max() <= 1
    assert same(before, teacher) and teacher.training and all(p.requires_grad for p in teacher.parameters())
    assert not teacher[1]._forward_pre_hooks
    teacher.eval()
    assert F.cross_entropy(teacher(made), wanted) < F.cross_entropy(teacher(start), wanted)
    only = schemes.synthetic_batch(teacher, start, wanted, steps=60, rate=0.01, statistics_weight=100.0)
    assert far(only) < 0.9 * far(start)
    with torch.no_grad():
        assert torch.equal(schemes.synthetic_batch(teacher, start, wanted, steps=0), start)
    for bad in ({"rate": -1.0}, {"bounds": (1.0, 0.0)}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            schemes.synthetic_batch(teacher, start, wanted, **bad)


def test_what_a_teacher_wrote_ends_where_it_ended():
    prompts = torch.tensor([[2, 6], [7, 8], [5, 9]])
    rest = {6: [1, 2, 9, 9], 8: [2, 1, 1, 1], 9: [1, 1]}  # 2 ends it; batches differ in length

    def generate(p: torch.Tensor) -> torch.Tensor:
        return torch.tensor([row + rest[row[1]] for row in p.tolist()])

    written = schemes.TeacherSequences.write(generate, prompts, end=2, padding=0, batch_size=2)
    assert written.tokens.tolist() == [[2, 6, 1, 2, 9, 9], [7, 8, 2, 1, 1, 1], [5, 9, 1, 1, 0, 0]]
    assert written.completion_mask.int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0]]
    whole = schemes.TeacherSequences.write(generate, prompts[:2])
    assert whole.completion_mask.int().tolist() == [[0, 0, 1, 1, 1, 1]] * 2
    batches = list(written.batches(2, torch.Generator().manual_seed(0)))
    assert [len(x) for x, _ in batches] == [2, 1]
    assert sorted(torch.cat([x for x, _ in batches])[:, 1].tolist()) == [6, 8, 9]
    tokens, mask = written.draw(5, torch.Generator().manual_seed(0))
    assert tokens.shape == mask.shape == (5, 6) and len(written) == 3
    z = torch.zeros(5, 6, 10, requires_grad=True)
    kdkernels.sequence_loss(z, tokens, mask).backward()
    assert (z.grad.abs().sum(2) > 0).equal(mask.roll(-1, 1))
    for bad in ((tokens, mask[:, 1:]), (tokens[0], mask[0]), (tokens[:0], mask[:0])):
        with pytest.raises(ValueError, match="with at least one sequence"):
            schemes.TeacherSequences(*bad)


def test_capacity_of_a_pair():
    small, large, huge = nn.Linear(1, 10, bias=False), nn.Linear(10, 10, bias=False), nn.Linear(1000, 100, bias=False)
    assert schemes.capacity_gap(small, large) == pytest.approx(1)
    assert schemes.capacity_gap(large, small) == 0
    assert schemes.by_capacity(small, small, 2.0, 8.0) == 2
    assert schemes.by_capacity(small, large, 2.0, 8.0) == pytest.approx(5)
    assert schemes.by_capacity(small, huge, 2.0, 8.0) == 8
    assert schemes.by_capacity(small, large, 1.0, 0.0, decades=4.0) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="must have parameters"):
        schemes.capacity_gap(nn.ReLU(), large)
    with pytest.raises(ValueError, match="decades"):
        schemes.by_capacity(small, large, 1.0, 2.0, decades=0.0)
