"""Contrastive losses against the published code's formulas in plain PyTorch, and the queue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sweep import BF16
from targets import Target

import kdkernels
from kdkernels import Queue, compress_loss, crd_loss, info_nce_distillation_loss, seed_loss

N, K, D = 6, 21, 5


def make(target: Target, generator: torch.Generator, teacher_size: int = D) -> dict[str, torch.Tensor]:
    """Embeddings (the student's requires grad) and normalised queues of both models."""
    sizes = {"student": (N, D), "teacher": (N, teacher_size), "queue": (K, D), "teacher_queue": (K, teacher_size)}
    made = {n: torch.randn(s, generator=generator).to(target.device) for n, s in sizes.items()}
    for n in ("queue", "teacher_queue"):
        made[n] = F.normalize(made[n], dim=1)
    made["student"].requires_grad_()
    return made


def same(loss: torch.Tensor, expected: torch.Tensor, *inputs: torch.Tensor) -> None:
    torch.testing.assert_close(loss.double(), expected.double(), rtol=3e-5, atol=1e-6)
    got, wanted = (torch.autograd.grad(x.sum(), inputs) for x in (loss, expected))
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_compress(target: Target, shared: bool, generator: torch.Generator) -> None:
    """CompReSSA: KL of softmaxed similarities, batchmean, temperature 0.04; one queue for both, or each its own."""
    x = make(target, generator, D if shared else 7)
    queue_t = x["queue"] if shared else x["teacher_queue"]
    s, t = F.normalize(x["student"], dim=1), F.normalize(x["teacher"], dim=1)
    expected = F.kl_div(
        F.log_softmax(s @ x["queue"].T / 0.04, 1), F.softmax(t @ queue_t.T / 0.04, 1), reduction="batchmean"
    )
    loss = compress_loss(
        x["student"], x["teacher"], x["queue"], None if shared else queue_t, chunk_bytes=400, backend=target.backend
    )
    same(loss, expected, x["student"])


@pytest.mark.parametrize("reduction", ["rowmean", "none"])
def test_seed(target: Target, reduction: str, generator: torch.Generator) -> None:
    """SEED's code: the teacher's own embedding is an extra column of both models' similarities."""
    x = make(target, generator)
    s, t = F.normalize(x["student"], dim=1), F.normalize(x["teacher"], dim=1)
    to_s = torch.cat([(s * t).sum(1, keepdim=True), s @ x["queue"].T], 1) / 0.2
    to_t = torch.cat([(t * t).sum(1, keepdim=True), t @ x["queue"].T], 1) / 1e-2
    rows = -(F.softmax(to_t, 1) * F.log_softmax(to_s, 1)).sum(1)
    loss = seed_loss(
        x["student"], x["teacher"], x["queue"], teacher_temperature=1e-2, reduction=reduction, chunk_bytes=400,
        backend=target.backend,
    )  # fmt: skip
    same(loss, rows if reduction == "none" else rows.mean(), x["student"])
    # At the authors' teacher temperature nearly all of the teacher's mass is on its own embedding.
    sharp = seed_loss(x["student"], x["teacher"], x["queue"], backend=target.backend)
    torch.testing.assert_close(sharp, -F.log_softmax(to_s, 1)[:, 0].mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["batch", "symmetric", "queue"])
def test_info_nce(target: Target, variant: str, generator: torch.Generator) -> None:
    x = make(target, generator)
    x["teacher"].requires_grad_()
    s, t = F.normalize(x["student"], dim=1), F.normalize(x["teacher"], dim=1)
    own = torch.arange(N, device=target.device)
    if variant == "queue":
        scores = torch.cat([(s * t).sum(1, keepdim=True), s @ x["queue"].T], 1) / 0.07
        expected = F.cross_entropy(scores, torch.zeros_like(own))
    else:
        expected = F.cross_entropy(s @ t.T / 0.07, own)
        if variant == "symmetric":
            expected = (expected + F.cross_entropy(t @ s.T / 0.07, own)) / 2
    loss = info_nce_distillation_loss(
        x["student"], x["teacher"], queue=x["queue"] if variant == "queue" else None, symmetric=variant == "symmetric",
        backend=target.backend,
    )  # fmt: skip
    same(loss, expected, x["student"], x["teacher"])


def published_nce(x: torch.Tensor, bank: torch.Tensor, idx: torch.Tensor, z: Any = None) -> torch.Tensor:
    """RepDistiller's ContrastMemory and ContrastLoss, for one model."""
    n, k = bank.shape[0], idx.shape[1] - 1
    out = torch.exp(torch.bmm(bank[idx.view(-1)].view(*idx.shape, -1), x.unsqueeze(2)) / 0.07).squeeze(2)
    out = out / ((out.mean() * n).detach() if z is None else z)
    m_pn = k / n
    positive = torch.log(out[:, 0] / (out[:, 0] + m_pn + 1e-7))
    negative = torch.log(m_pn / (out[:, 1:] + m_pn + 1e-7))
    return -(positive.sum() + negative.sum()) / idx.shape[0]


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("normalizers", [None, (30.0, 40.0)])
def test_crd(dense: bool, normalizers: Any, generator: torch.Generator) -> None:
    """Negatives that repeat, the own index among them too."""
    s, t = (torch.randn(N, D, generator=generator).requires_grad_() for _ in range(2))
    banks = [F.normalize(torch.randn(K, D, generator=generator), dim=1) for _ in range(2)]
    idx = torch.randint(0, K, (N, 30), generator=generator)
    z_s, z_t = normalizers or (None, None)
    expected = published_nce(F.normalize(s, dim=1), banks[1], idx, z_s)
    expected = expected + published_nce(F.normalize(t, dim=1), banks[0], idx, z_t)
    loss = crd_loss(s, t, *banks, idx, normalizers=normalizers, dense=dense)
    same(loss, expected, s, t)
    with pytest.raises(IndexError, match=f"indices must be from 0 to {K - 1}; got {K}"):
        crd_loss(s, t, *banks, idx.masked_fill(idx == idx[0, 0], K))


@pytest.mark.parametrize("dense", [True, False])
def test_crd_with_banks_made_in_inference_mode(dense: bool, generator: torch.Generator) -> None:
    s, t = (torch.randn(N, D, generator=generator).requires_grad_() for _ in range(2))
    banks = [F.normalize(torch.randn(K, D, generator=generator), dim=1) for _ in range(2)]
    idx = torch.randint(0, K, (N, 5), generator=generator)
    with torch.inference_mode():
        frozen = [x.clone() for x in (*banks, idx)]
    same(crd_loss(s, t, *frozen, dense=dense), crd_loss(s, t, *banks, idx, dense=dense), s, t)


@pytest.mark.parametrize("name", ["compress_loss", "seed_loss", "info_nce_distillation_loss", "crd_loss"])
def test_zero_embeddings_have_no_gradient(name: str, generator: torch.Generator) -> None:
    x = make(Target("cpu", "cpu"), generator)
    student = x["student"].detach()
    student[2] = 0
    student = student.to(BF16).requires_grad_()
    extra = {"compress_loss": [x["queue"]], "seed_loss": [x["queue"]]}.get(name, [])
    if name == "crd_loss":
        extra = [x["queue"], x["teacher_queue"], torch.randint(0, K, (N, 4), generator=generator)]
    loss = getattr(kdkernels, name)(student, x["teacher"], *extra)
    gradient = torch.autograd.grad(loss, student)[0]
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[2].any()
    assert gradient[0].any()


def test_a_queue_may_change_before_the_backward(generator: torch.Generator) -> None:
    """Compute the loss, enqueue, go backward: what everybody's step does, here without a copy of the queue."""
    x = make(Target("cpu", "cpu"), generator)
    queue = Queue(K, D, generator=generator)
    loss = compress_loss(x["student"], x["teacher"], queue.entries, queue.entries)
    expected = torch.autograd.grad(loss, x["student"], retain_graph=True)[0]
    queue.enqueue(x["teacher"])
    assert torch.equal(torch.autograd.grad(loss, x["student"])[0], expected)


def test_queue_overwrites_the_oldest(generator: torch.Generator) -> None:
    queue = Queue(5, 3, generator=generator)
    where = queue.entries.data_ptr()
    batches = [torch.randn(2, 3, generator=generator) for _ in range(4)]
    for batch in batches:
        queue.enqueue(batch)
    last = F.normalize(torch.cat(batches)[-5:], dim=1)
    torch.testing.assert_close(queue.entries[torch.tensor([3, 4, 0, 1, 2])], last)
    assert queue.entries.data_ptr() == where
    other = Queue(5, 3)
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.entries, queue.entries) and other.position == 3
    with pytest.raises(ValueError, match="6 embeddings do not fit a queue of 5"):
        queue.enqueue(torch.zeros(6, 3))
    with pytest.raises(ValueError, match=r"shape \(N, 3\), got \(2, 4\)"):
        queue.enqueue(torch.zeros(2, 4))


def test_queue_compiles(generator: torch.Generator) -> None:
    torch._dynamo.reset()
    queue, twin = (Queue(5, 3, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    step = torch.compile(queue.enqueue, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        batch = torch.randn(2, 3, generator=generator)
        step(batch)
        twin.enqueue(batch)
    torch.testing.assert_close(queue.entries, twin.entries)
    torch._dynamo.reset()


def test_bad_input(generator: torch.Generator) -> None:
    x = make(Target("cpu", "cpu"), generator, 7)
    s, t, q, qt = x.values()
    with pytest.raises(
        ValueError, match=r"queue must have shape \(K, 7\), K at least 1 and as wide as teacher; got \(21, 5\)"
    ):
        compress_loss(s, t, q)
    with pytest.raises(ValueError, match="the same samples: 21 and 20"):
        compress_loss(s, t, q, qt[:20])
    with pytest.raises(ValueError, match="embeddings of one size, got 5 and 7"):
        seed_loss(s, t, q)
    with pytest.raises(ValueError, match="symmetric goes with the batch's negatives only"):
        info_nce_distillation_loss(s, s, queue=q, symmetric=True)
    with pytest.raises(ValueError, match="temperature must be"):
        compress_loss(s, t, q, qt, temperature=0.0)
