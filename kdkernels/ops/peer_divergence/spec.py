"""Cases of mutual learning for tests, bench and check. A shape is that of one learner's scores."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from kdkernels.losses import mutual
from kdkernels.ops.registry import Case, Inputs, Shape, Spec

SHAPES: tuple[Shape, ...] = ((1, 1), (3, 2), (5, 7), (4, 100), (7, 1000), (3, 1025), (2, 3, 130), (2, 4099))
BENCH = {"cifar": (64, 100), "imagenet": (256, 1000), "llm-32k": (64, 32000)}
BENCH_GPU = {"cifar": (64, 100), "imagenet": (256, 1000), "llm-32k": (4096, 32000), "llm-128k": (1024, 128256)}


def make_peers(shape: Shape, generator: torch.Generator, learners: int) -> Inputs:
    """Logits with the spread of trained models, (learners, *shape)."""
    return {"logits": 3 * torch.randn((learners, *shape), generator=generator)}


def make_agreeing(shape: Shape, generator: torch.Generator, learners: int) -> Inputs:
    """Learners that have nearly come together."""
    return {
        "logits": 3 * torch.randn(shape, generator=generator)
        + 0.1 * torch.randn((learners, *shape), generator=generator)
    }


def make_labelled(shape: Shape, generator: torch.Generator, learners: int) -> Inputs:
    """The same with labels, about a quarter of them ignored (never all)."""
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    ignored = torch.rand(shape[:-1], generator=generator) < 0.25
    ignored.view(-1)[0] = False
    return {**make_peers(shape, generator, learners), "labels": labels.masked_fill(ignored, -100)}


def make_weighted(shape: Shape, generator: torch.Generator, learners: int) -> Inputs:
    return {**make_peers(shape, generator, learners), "weight": torch.rand(shape[:-1], generator=generator)}


def eager_mutual(logits: torch.Tensor, temperature: float = 1.0, **_: Any) -> torch.Tensor:
    """As it is written: a loop over the ordered pairs."""
    peers = logits.flatten(1, -2).unbind(0)
    log_p = [F.log_softmax(x / temperature, dim=-1) for x in peers]
    p = [F.softmax(x.detach() / temperature, dim=-1) for x in peers]
    loss = logits.new_zeros(())
    for i, own in enumerate(log_p):
        for j, target in enumerate(p):
            if i != j:
                loss = loss + F.kl_div(own, target, reduction="batchmean")
    return loss * temperature**2 / (len(peers) - 1)


def _floor_bytes(learners: int, shape: Shape, itemsize: int, backward: bool) -> int:
    """Read every learner; write its gradient."""
    return (2 if backward else 1) * learners * torch.Size(shape).numel() * itemsize


def _case(name: str, make: Any = make_peers, learners: int = 4, bench: bool = False, **options: Any) -> Case:
    return Case(
        name, mutual.mutual_kl_div, functools.partial(make, learners=learners), options,
        eager=eager_mutual if bench else None, grads=("logits",), shapes=SHAPES,
        bench=BENCH if bench else {}, bench_gpu=BENCH_GPU if bench else {},
        floor_bytes=functools.partial(_floor_bytes, learners), bench_dtypes=(torch.float32, torch.bfloat16), headline=bench,
    )  # fmt: skip


SPEC = Spec(
    family="peer_divergence",
    backends=("reference", "cpu", "triton", "cuda"),
    cases=(
        _case("mutual_kl_div", bench=True),
        _case("mutual_kl_div-2", learners=2, temperature=4.0, bench=True),
        _case("mutual_kl_div-3-pair-sum", learners=3, pairs="pair_sum", temperature=2.0, reduction="batchmean"),
        _case("mutual_kl_div-5-mean", learners=5, pairs="mean", temperature=2.0, scale_by_t2=False, reduction="mean"),
        _case("mutual_kl_div-16", learners=16, reduction="sum"),
        _case("mutual_kl_div-agreeing", make_agreeing),
        _case("mutual_kl_div-none", reduction="none", temperature=3.0),
        _case("mutual_kl_div-labels", make_labelled, temperature=2.0),
        _case("mutual_kl_div-weight", make_weighted, learners=3, temperature=2.0),
        _case("mutual_kl_div-num-items", make_labelled, num_items=37.0),
    ),
)
