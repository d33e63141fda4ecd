"""kdkernels.schemes: what each piece computes, who learns and who stays as they were."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdkernels
from kdkernels import schemes


def network(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    scramble(model, generator)
    return model.to(dtype)


@torch.no_grad()
def scramble(model: nn.Module, generator: torch.Generator) -> None:
    for x in (*model.parameters(), *model.buffers()):
        x.copy_(torch.rand(x.shape, generator=generator) if x.is_floating_point() else x + 1)


def labels_of(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(4, (n,), generator=generator)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# EMA


@pytest.mark.parametrize(
    ("warmup", "decays"), [(None, [0.6] * 4), (2.0, [1 / 2, 0.6, 0.6, 0.6]), (10.0, [1 / 10, 2 / 11, 3 / 12, 4 / 13])]
)
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_ema_is_the_formula(warmup, decays, buffers, generator):
    student = network(generator)
    teacher = schemes.EMATeacher(student, 0.6, warmup=warmup, buffers=buffers)
    expected = {n: x.double() for n, x in student.state_dict().items()}
    parameters = dict(student.named_parameters())
    for decay in decays:
        scramble(student, generator)
        assert teacher.current_decay() == pytest.approx(decay)
        teacher.update(student)
        for n, x in student.state_dict().items():
            averaged = n in parameters or (buffers == "average" and x.is_floating_point())
            expected[n] = decay * expected[n] + (1 - decay) * x.double() if averaged else x.double()
    for n, x in teacher.model.state_dict().items():
        torch.testing.assert_close(x.double(), expected[n], atol=1e-6, rtol=1e-6)


def test_ema_moves_where_half_precision_would_stand_still(generator):
    student = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    nn.init.constant_(student.weight, 1.0)
    teacher = schemes.EMATeacher(student, 0.999, warmup=None)
    nn.init.constant_(student.weight, 2.0)
    for _ in range(100):
        teacher.update(student)
    torch.testing.assert_close(teacher.model.weight.float(), torch.full((4, 4), 2 - 0.999**100), atol=0.005, rtol=0)


def test_ema_teacher_only_teaches(generator):
    student = network(generator)
    teacher = schemes.EMATeacher(student)
    teacher.train()
    assert not teacher.training and not any(m.training for m in teacher.modules())
    before = copy.deepcopy(teacher.model)
    assert not teacher(torch.randn(5, 6, generator=generator)).requires_grad
    assert same(before, teacher.model)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())


def test_ema_survives_saving(generator):
    student = network(generator, torch.bfloat16)
    teacher = schemes.EMATeacher(student, 0.9)
    scramble(student, generator)
    teacher.update(student)
    other = schemes.EMATeacher(network(generator, torch.bfloat16), 0.9)
    other.load_state_dict(teacher.state_dict())
    assert other.updates == 1
    scramble(student, generator)
    for t in (teacher, other):
        t.update(student)
    assert same(teacher.model, other.model)


def test_ema_looks_inside_a_compiled_model(generator):
    student = network(generator)
    teacher = schemes.EMATeacher(torch.compile(student), 0.0)
    scramble(student, generator)
    teacher.update(torch.compile(student))
    assert same(teacher.model, student)


def test_ema_refuses_another_model(generator):
    teacher = schemes.EMATeacher(network(generator))
    with pytest.raises(ValueError, match=r"they differ in 0\.bias"):
        teacher.update(nn.Sequential(nn.Linear(6, 9)))
    for bad in ({"decay": 1.5}, {"warmup": 1.0}, {"buffers": "no"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            schemes.EMATeacher(network(generator), **bad)


def test_temporal_ensemble(generator):
    table = schemes.TemporalEnsemble(5, 3, momentum=0.6)
    first, second = (torch.randn(2, 3, generator=generator) for _ in range(2))
    table.update(torch.tensor([4, 1]), first)
    torch.testing.assert_close(table(torch.tensor([1, 4])), first.flip(0))
    table.update(torch.tensor([4, 1]), second)
    expected = (0.6 * 0.4 * first + 0.4 * second) / (1 - 0.6**2)
    torch.testing.assert_close(table(torch.tensor([4, 1])), expected)
    assert table.seen(torch.tensor([0, 1])).tolist() == [False, True]
    assert table(torch.tensor([0])).tolist() == [[0, 0, 0]]


# Peers


def pair(own: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return F.kl_div(own.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def gradients(loss: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.zeros_like(x) if g is None else g
            for x, g in zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True)]  # fmt: skip


def test_mutual_learning_is_each_models_own_loss(generator):
    z = [torch.randn(7, 4, generator=generator).requires_grad_() for _ in range(3)]
    y = labels_of(7, generator)
    loss = schemes.mutual_learning_loss(z, y, weight=0.5)
    own = [F.cross_entropy(z[i], y) + 0.5 / 2 * sum(pair(z[i], z[j].detach()) for j in range(3) if j != i)
           for i in range(3)]  # fmt: skip
    torch.testing.assert_close(loss, torch.stack(own).sum())
    for i, g in enumerate(gradients(loss, z)):
        torch.testing.assert_close(g, torch.autograd.grad(own[i], z[i])[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_collaboration_controls_who_moves(share, generator):
    large, small = (torch.randn(7, 4, generator=generator).requires_grad_() for _ in range(2))
    y = labels_of(7, generator)
    loss = schemes.collaborative_loss(
        [large, small], y, influence=[[0, 0.1], [2, 0]], teaching_gradient=share, label_weights=[1, 0.5]
    )
    ce = F.cross_entropy(large, y) + 0.5 * F.cross_entropy(small, y)
    torch.testing.assert_close(loss, ce + 0.1 * pair(large, small) + 2 * pair(small, large))
    listening = ce + 0.1 * pair(large, small.detach()) + 2 * pair(small, large.detach())
    teaching = 0.1 * pair(large.detach(), small) + 2 * pair(small.detach(), large)
    expected = [a + share * b for a, b in zip(gradients(listening, [large, small]),
                                              gradients(teaching, [large, small]), strict=True)]  # fmt: skip
    for g, e in zip(gradients(loss, [large, small]), expected, strict=True):
        torch.testing.assert_close(g, e, atol=1e-6, rtol=1e-5)


def test_a_teacher_who_does_not_listen_learns_as_if_alone(generator):
    large, small = (torch.randn(7, 4, generator=generator).requires_grad_() for _ in range(2))
    y = labels_of(7, generator)
    loss = schemes.collaborative_loss([large, small], y, influence=[[0, 0], [1, 0]])
    torch.testing.assert_close(gradients(loss, [large]), gradients(F.cross_entropy(large, y), [large]))


def test_ensembles(generator):
    z = torch.randn(3, 7, 4, generator=generator)
    y = labels_of(7, generator)
    torch.testing.assert_close(schemes.ensemble_logits(z), z.mean(0))
    losses = torch.stack([F.cross_entropy(x, y, reduction="none") for x in z])
    best = torch.stack([z[losses[:, k].argmin(), k] for k in range(7)])
    assert torch.equal(schemes.ensemble_logits(list(z), y, how="best"), best)
    gate = torch.eye(3)[torch.randint(3, (7,), generator=generator)]
    picked = torch.stack([z[gate[k].argmax(), k] for k in range(7)])
    torch.testing.assert_close(schemes.ensemble_logits(z, how="gate", gate=gate), picked)
    with pytest.raises(ValueError, match="labels"):
        schemes.ensemble_logits(z, how="best")


LOSSES = {
    "mutual": schemes.mutual_learning_loss,
    "collaborative": lambda z, y, **o: schemes.collaborative_loss(z, y, influence=[[0, 1], [1, 0]], **o),
    "heads": schemes.self_distillation_loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_rows_left_out_count_for_nothing(name, generator):
    z, y = (2 * torch.randn(2, 7, 4, generator=generator)).requires_grad_(), labels_of(7, generator)
    some = y.clone()
    some[[1, 4]] = -1
    kept = some >= 0
    loss = LOSSES[name](list(z), some, ignore_index=-1)
    expected = LOSSES[name](list(z[:, kept]), y[kept])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(expected, z))
    nothing = LOSSES[name](list(z), torch.full_like(y, -1), ignore_index=-1)
    assert nothing.item() == 0 and torch.autograd.grad(nothing, z)[0].count_nonzero() == 0


def test_bad_influence(generator):
    z, y = torch.randn(2, 7, 4, generator=generator), labels_of(7, generator)
    with pytest.raises(ValueError, match="2 rows of 2 weights"):
        schemes.collaborative_loss(z, y, influence=[[0, 1]])
    with pytest.raises(ValueError, match=r"influence\[1\]\[0\]"):
        schemes.collaborative_loss(z, y, influence=[[0, 1], [-1, 0]])


# Early exits


class Counting(nn.Module):
    """Counts the samples that reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return x


class Sharpness(nn.Module):
    """Scores whose confidence is the sample's own number, times the head's."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.factor * x[:, 0], torch.zeros(len(x))], -1)


def test_early_exit_takes_the_first_head_that_is_sure():
    model = schemes.EarlyExitNetwork([Counting() for _ in range(3)], map(Sharpness, (1.0, 10.0, 100.0))).eval()
    x = torch.tensor([[0.001], [5.0], [0.5], [0.0], [9.0]])
    logits, exits = model.infer(x, 0.9)
    assert exits.tolist() == [2, 0, 1, 2, 0]
    every = model(x)
    assert torch.equal(logits, torch.stack([every[k][n] for n, k in enumerate(exits.tolist())]))
    assert [stage.seen - 5 for stage in model.stages] == [5, 3, 2]
    assert model.infer(x, 0.0)[1].tolist() == [0] * 5
    assert model.infer(x, 1.5)[1].tolist() == [2] * 5
    assert model.infer(x, [1.5, 0.0])[1].tolist() == [1] * 5
    assert model.infer(x[:0])[0].shape == (0, 2)
    with pytest.raises(ValueError, match="2 numbers"):
        model.infer(x, [0.5])
    with pytest.raises(RuntimeError, match="eval"):
        model.train().infer(x)


def test_self_distillation_trains_heads_and_leaves_the_deepest_to_the_labels(generator):
    z = [torch.randn(7, 4, generator=generator).requires_grad_() for _ in range(3)]
    y = labels_of(7, generator)
    loss = schemes.self_distillation_loss(z, y, alpha=0.3)
    heads = kdkernels.auxiliary_heads_loss(z[:2], z[2], y, alpha=0.3)
    torch.testing.assert_close(loss, F.cross_entropy(z[2], y) + heads)
    torch.testing.assert_close(gradients(loss, z)[2], gradients(F.cross_entropy(z[2], y), z)[2])
    torch.testing.assert_close(schemes.self_distillation_loss(z[2:], y), F.cross_entropy(z[2], y))


# Schedules


def test_schedules_have_their_endpoints():
    assert schemes.Constant(3.0)(17) == 3.0
    for schedule in (schemes.Linear(7.3, 1.1, 10, delay=5), schemes.Cosine(7.3, 1.1, 10, delay=5)):
        assert [schedule(s) for s in (-1, 0, 5)] == [7.3] * 3
        assert [schedule(s) for s in (15, 16, 1e9)] == [1.1] * 3
        assert schedule(10) == pytest.approx((7.3 + 1.1) / 2)
        values = [schedule(s) for s in range(20)]
        assert values == sorted(values, reverse=True)
    assert schemes.Linear(0, 1, 4)(1) == 0.25
    assert schemes.Cosine(0, 1, 4)(1) == pytest.approx((1 - 0.5**0.5) / 2)
    with pytest.raises(ValueError, match="steps"):
        schemes.Linear(0, 1, 0)


def test_confidence_is_the_teachers_probability(generator):
    t, y = torch.randn(7, 4, generator=generator, requires_grad=True), labels_of(7, generator)
    y[2] = -100
    p = t.detach().softmax(-1)
    expected = torch.stack([p[k, y[k]] ** 2 if k != 2 else torch.tensor(0.0) for k in range(7)])
    weight = schemes.confidence_weight(t, y, power=2.0)
    torch.testing.assert_close(weight, expected)
    assert not weight.requires_grad
    torch.testing.assert_close(schemes.confidence_weight(t), p.amax(-1))
    at_2 = (t.detach() / 2).softmax(-1)
    torch.testing.assert_close(schemes.confidence_weight(t, temperature=2.0, power=3.0), at_2.amax(-1) ** 3)
    assert kdkernels.kl_div(torch.randn(7, 4, generator=generator), t.detach(), weight=weight).isfinite()


@pytest.mark.parametrize("adversarial", [False, True])
def test_learnable_temperature_gets_the_kernels_gradient(adversarial, generator):
    s, t = (3 * torch.randn(7, 4, generator=generator) for _ in range(2))
    temperature = schemes.LearnableTemperature(3.0, adversarial=adversarial)
    assert temperature().item() == pytest.approx(3.0, abs=1e-5)
    kdkernels.kl_div(s, t, temperature=temperature(0.5)).backward()
    u = temperature.u.detach().double().requires_grad_()
    value = 1 + 20 * u.sigmoid()
    own, other = ((x.double() / value).log_softmax(-1) for x in (s, t))
    (expected,) = torch.autograd.grad(value**2 * F.kl_div(own, other, reduction="batchmean", log_target=True), u)
    torch.testing.assert_close(
        temperature.u.grad.double(), expected * (-0.5 if adversarial else 0.5), rtol=1e-4, atol=1e-6
    )
    assert not temperature(0.0).requires_grad
    with pytest.raises(ValueError, match="in that order"):
        schemes.LearnableTemperature(1.0)


# Teachers in a row


def step(student: nn.Module, teachers: Sequence[nn.Module], x: torch.Tensor, y: torch.Tensor) -> None:
    """One step of a training loop: from labels alone, or from teachers too."""
    logits = student(x)
    loss = F.cross_entropy(logits, y)
    if teachers:
        loss = loss + kdkernels.kl_div(logits, schemes.average_logits(teachers, x))
    loss.backward()
    with torch.no_grad():
        for p in student.parameters():
            p -= 0.1 * p.grad


@pytest.mark.parametrize("dense", [False, True])
def test_a_chain_trains_each_and_freezes_its_teachers(dense, generator):
    teacher, *students = (network(generator) for _ in range(4))
    teacher[0].weight.requires_grad_(False)  # flags and modes come back as they were
    start = [copy.deepcopy(m) for m in (teacher, *students)]
    x, y = torch.randn(9, 6, generator=generator), labels_of(9, generator)
    taught, during = [], []

    def train(student, teachers):
        taught.append(teachers)
        assert student.training and not any(t.training or t[1].training for t in teachers)
        assert not any(p.requires_grad for t in teachers for p in t.parameters())
        kept = [copy.deepcopy(t) for t in teachers]
        step(student, teachers, x, y)
        during.extend(same(a, b) for a, b in zip(kept, teachers, strict=True))

    trained = schemes.distill_chain(students, train, teacher=teacher, dense=dense)
    assert trained == students
    assert during and all(during)
    a, b, _ = students
    assert taught == ([(teacher,), (teacher, a), (teacher, a, b)] if dense else [(teacher,), (a,), (b,)])
    assert same(start[0], teacher)
    assert not any(same(one, other) for one, other in zip(start[1:], students, strict=True))
    assert teacher.training and not teacher[0].weight.requires_grad and teacher[3].weight.requires_grad
    assert all(p.requires_grad for s in students for p in s.parameters())


def test_born_again_starts_from_labels_and_then_from_itself(generator):
    x, y = torch.randn(9, 6, generator=generator), labels_of(9, generator)
    seen = []

    def train(student, teachers):
        seen.append((student, teachers))
        step(student, teachers, x, y)

    generations = schemes.born_again(lambda: network(generator), 3, train)
    assert seen == list(zip(generations, [(), (generations[0],), (generations[1],)], strict=True))
    expected = torch.stack([m.eval()(x) for m in generations]).mean(0)
    torch.testing.assert_close(schemes.average_logits(generations, x), expected)
    one = network(generator)
    with pytest.raises(ValueError, match=r"students\[1\] is one of its own"):
        schemes.born_again(lambda: one, 2, train)
    with pytest.raises(ValueError, match="generations"):
        schemes.born_again(lambda: one, 0, train)


def test_frozen_thaws_after_an_error(generator):
    model = network(generator)
    with pytest.raises(RuntimeError, match="stop"), schemes.frozen(model):
        raise RuntimeError("stop")
    assert model.training and all(p.requires_grad for p in model.parameters())


# A model's own past


def test_snapshot_keeps_until_renewed(generator):
    student = network(generator)
    teacher = schemes.SnapshotTeacher(student)
    weight, before = teacher.model[0].weight, copy.deepcopy(student)
    scramble(student, generator)
    teacher.train()
    x = torch.randn(5, 6, generator=generator)
    assert not teacher(x).requires_grad
    assert same(teacher.model, before) and not teacher.model.training
    teacher.update(student)
    assert same(teacher.model, student) and teacher.model[0].weight is weight
    torch.testing.assert_close(teacher(x), student.eval()(x))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_anchor_distillation_is_the_mixture(share, generator):
    s = (2 * torch.randn(7, 4, generator=generator)).requires_grad_()
    a, t = 2 * torch.randn(7, 4, generator=generator), 2.0
    loss = schemes.anchor_distillation_loss(s, a, anchor_weight=share, temperature=t)
    z = s.detach().double().requires_grad_()
    mixed = share * (a.double() / t).softmax(-1) + (1 - share) * (z.detach() / t).softmax(-1)
    expected = t**2 * F.kl_div((z / t).log_softmax(-1), mixed, reduction="batchmean")
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-5)
    (grad,), (e,) = torch.autograd.grad(loss, s), torch.autograd.grad(expected, z)
    torch.testing.assert_close(grad.double(), e, atol=1e-6, rtol=1e-5)
    if share == 1.0:
        torch.testing.assert_close(loss, kdkernels.kl_div(s, a, temperature=t), atol=1e-6, rtol=1e-5)


def test_anchor_with_classes_ruled_out():
    s = torch.tensor([[1.0, 2.0, -float("inf")]], requires_grad=True)
    loss = schemes.anchor_distillation_loss(s, torch.tensor([[0.5, 0.0, -float("inf")]]), temperature=torch.tensor(2.0))
    loss.backward()
    assert loss.isfinite() and s.grad.isfinite().all()
    with pytest.raises(TypeError, match="from_log_probs"):
        schemes.anchor_distillation_loss(s, s, from_log_probs=True)


class TwoTasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.heads = nn.ModuleDict({"old": nn.Linear(8, 4), "older": nn.Linear(8, 3), "new": nn.Linear(8, 2)})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {task: head(self.body(x)) for task, head in self.heads.items()}


def test_learning_without_forgetting(generator):
    model, memory = TwoTasks(), schemes.LearningWithoutForgetting(0.5, temperature=3.0)
    scramble(model, generator)
    x = torch.randn(7, 6, generator=generator)
    assert memory(model(x), x) == 0.0
    memory.remember(model, "older")
    scramble(model, generator)
    memory.remember(model, "old")
    old = {task: z.detach() for task, z in model(x).items()}
    scramble(model, generator)
    now = model(x)
    terms = [kdkernels.lwf_loss(now[task], old[task], temperature=3.0) for task in ("older", "old")]
    loss = memory(now, x)
    torch.testing.assert_close(loss, 0.5 * sum(terms))
    loss.backward()
    assert model.body.weight.grad is not None and model.heads["new"].weight.grad is None
    assert not any(p.requires_grad for p in memory.parameters())
    with pytest.raises(KeyError, match="older"):
        memory({"old": now["old"]}, x)


# Labels


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        (torch.zeros(5), TypeError, r"labels must hold class indices \(int64\), got float32"),
        (
            torch.zeros(4, dtype=torch.long),
            ValueError,
            r"labels must have the shape of the scores .* \(5,\); got \(4,\)",
        ),
        (torch.full((5,), 7), IndexError, "labels hold 7, outside 0 to 3"),
        ([0] * 5, TypeError, "labels must be a tensor, got list"),
    ],
    ids=["floating", "shape", "range", "list"],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda z, y: schemes.mutual_learning_loss([z, z], y),
        lambda z, y: schemes.collaborative_loss([z, z], y, influence=[[0, 1], [1, 0]]),
        lambda z, y: schemes.self_distillation_loss([z, z], y),
        lambda z, y: schemes.semi_supervised_loss(z, z, y),
        lambda z, y: schemes.confidence_weight(z, y),
        lambda z, y: schemes.ensemble_logits([z, z], y, how="best"),
    ],
    ids=["mutual", "collaborative", "self", "semi-supervised", "confidence", "ensemble"],
)
def test_bad_labels_are_named(call, labels, error, words):
    with pytest.raises(error, match=words):
        call(torch.zeros(5, 4), labels)
