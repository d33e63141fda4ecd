"""Losses over the samples of all ranks of a group: checks for tests/ranks.py to run.

The yardstick is the same loss of the whole batch in one process, in float64. A rank's gradient is that of all ranks' losses
together: as many times the whole batch's as there are ranks, which averaging them undoes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels as kd
from kdkernels.distributed import batch as batch_of_ranks

F64 = torch.float64
DS, DT, K = 5, 7, 6
EQUAL, UNEQUAL = (2, 2, 2, 2), (3, 0, 4, 2)
Call = Callable[..., torch.Tensor]


def _queue(width: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.linspace(-1, 1, K * width, dtype=F64).sin().view(K, width), dim=1)


def _plain(function: Call, **options: Any) -> Call:
    return lambda batch, group, **more: function(batch["s"], batch["t"], **options, **_given(group), **more)


def _given(group: Any) -> dict[str, Any]:
    return {} if group is None else {"group": group}


def _same_width(function: Call, *queues: torch.Tensor, weighted: bool = True, **options: Any) -> Call:
    def call(batch: dict[str, torch.Tensor], group: Any, **more: Any) -> torch.Tensor:
        of = {"weight": batch["w"]} if weighted else {}
        s, t = batch["s"], batch["t"][:, :DS]
        return function(s, t, *(q.to(s.dtype) for q in queues), **of, **options, **_given(group), **more)

    return call


def _crd(batch: dict[str, torch.Tensor], group: Any, dense: bool | None = None) -> torch.Tensor:
    s, t = batch["s"], batch["t"][:, :DS]
    bank = _queue(DS).to(s.dtype)
    return kd.crd_loss(s, t, bank, bank.flip(0), batch["indices"], dense=dense, **_given(group))


def _labelled(batch: dict[str, torch.Tensor], group: Any, **more: Any) -> torch.Tensor:
    labels = batch["indices"][:, 0] % 2
    return kd.rkd_distance_loss(batch["s"], batch["t"], labels=labels, reduction="pairs", **_given(group), **more)


def _masked(batch: dict[str, torch.Tensor], group: Any, **more: Any) -> torch.Tensor:
    """A row of the mask for each sample of this rank's."""
    return kd.rkd_distance_loss(batch["s"], batch["t"], mask=batch["mask"] > 0.2, **_given(group), **more)


def _irg(batch: dict[str, torch.Tensor], group: Any) -> torch.Tensor:
    layers = [(x.unflatten(1, (-1, 1, 1)) * torch.ones(2, 2, dtype=x.dtype), x) for x in (batch["s"], batch["t"])]
    return kd.instance_relation_graph_loss(*layers, batch["s"], batch["t"][:, :DS], **_given(group))


def _edges(batch: dict[str, torch.Tensor], group: Any) -> torch.Tensor:
    """Each node's edges to the first and the last node of all, known where the node is."""
    n = batch["place"][:, 1]
    here = batch["place"][:, 0]
    edges = torch.cat([torch.stack([torch.zeros_like(here), here]), torch.stack([n - 1, here])], 1)
    return kd.local_structure_loss(batch["s"], batch["t"], edges, **_given(group))


def _dist(batch: dict[str, torch.Tensor], group: Any) -> torch.Tensor:
    """Columns over the rows of all ranks, two for each sample, some left out."""
    s, t = (torch.stack([x, x.sin()], 2) for x in (batch["s"], batch["t"][:, :DS]))
    w = torch.stack([batch["w"], 1 - batch["w"]], 1)
    labels = batch["indices"][:, :2].clamp(max=DS - 1)
    return kd.dist_loss(s, t, dim=1, weight=w, labels=labels, ignore_index=2, **_given(group))


def _pixels(batch: dict[str, torch.Tensor], group: Any) -> torch.Tensor:
    s, t = (torch.stack([x, x.cos(), x.sin(), x + 1], 2).unflatten(2, (2, 2)) for x in (batch["s"], batch["t"]))
    return kd.cross_image_relation_loss(s, t, temperature=0.5, **_given(group))


GATHERED: dict[str, Call] = {
    "rkd_angle": _plain(kd.rkd_angle_loss),
    "rkd": _plain(kd.rkd_loss, normalize=True),
    "graph": _plain(kd.graph_structure_loss, temperature=0.5),
    "neighbours": lambda batch, group: kd.correlation_congruence_loss(
        batch["s"], batch["t"][:, :DS], kernel="neighbours", **_given(group)
    ),
    "local": _edges,
    "irg": _irg,
    "crd": _crd,
    "crd-gathered": lambda batch, group: _crd(batch, group, False),
    "compress": _same_width(kd.compress_loss, _queue(DS), temperature=0.3),
    "seed": _same_width(kd.seed_loss, _queue(DS), teacher_temperature=0.1, reduction="mean"),
    "info_nce-queue": lambda batch, group: kd.info_nce_distillation_loss(
        batch["s"], batch["t"][:, :DS], queue=_queue(DS).to(batch["s"].dtype), reduction="batchmean", **_given(group)
    ),
    "cross_image": _pixels,
    "dist": _dist,
}
IN_A_RING: dict[str, Call] = {
    "rkd_distance": _plain(kd.rkd_distance_loss),
    "rkd_distance-labels": _labelled,
    "rkd_distance-mask": _masked,
    "rkd_distance-squared": _plain(kd.rkd_distance_loss, squared=True, mean_normalize=False, reduction="sum"),
    "hard_dark_rank": _plain(kd.hard_dark_rank_loss, k=3, alpha=0.1),
    "sp": _plain(kd.similarity_preserving_loss),
    "sp-l1": _plain(kd.similarity_preserving_loss, norm="l1", reduction="sum"),
    "cosine": _plain(kd.cosine_similarity_matrix_loss),
    "cc": _plain(kd.correlation_congruence_loss, gamma=0.3),
    "cc-frobenius": _plain(kd.correlation_congruence_loss, kernel="correlation", distance="frobenius"),
    "pkt": _plain(kd.pkt_loss),
    "global": _plain(kd.global_structure_loss),
    "global-polynomial": _plain(kd.global_structure_loss, kernel="polynomial", offset=1.0, reduction="sum"),
    "global-euclidean": _plain(kd.global_structure_loss, kernel="euclidean"),
    "global-rbf": _plain(kd.global_structure_loss, kernel="rbf"),
    "info_nce": _same_width(kd.info_nce_distillation_loss, temperature=0.5),
    "info_nce-symmetric": _same_width(kd.info_nce_distillation_loss, symmetric=True, weighted=False, reduction="mean"),
}
ROWS: dict[str, Call] = {
    "hard_dark_rank": _plain(kd.hard_dark_rank_loss, alpha=0.1, reduction="none"),
    "info_nce": _same_width(kd.info_nce_distillation_loss, reduction="none"),
}


def whole_batch(n: int, dtype: torch.dtype = F64) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(n)
    return {
        "s": torch.randn(n, DS, generator=g, dtype=F64).to(dtype).requires_grad_(),
        "t": torch.randn(n, DT, generator=g, dtype=F64).to(dtype).requires_grad_(),
        "w": torch.rand(n, generator=g, dtype=F64).to(dtype),
        "mask": torch.rand(n, n, generator=g, dtype=F64).to(dtype),
        "indices": torch.randint(K, (n, 4), generator=g),
        "place": torch.stack([torch.arange(n), torch.full((n,), n)], 1),
    }


def part(batch: dict[str, torch.Tensor], counts: tuple[int, ...], rank: int) -> dict[str, torch.Tensor]:
    first = sum(counts[:rank])
    rows = slice(first, first + counts[rank])
    return {k: x.detach()[rows].clone().requires_grad_(x.requires_grad) for k, x in batch.items()}


def rows_of(x: torch.Tensor, counts: tuple[int, ...], rank: int) -> torch.Tensor:
    first = sum(counts[:rank])
    return x[first : first + counts[rank]]


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """Names of the exchanges that took place."""
    calls: list[str] = []

    def spied(name: str, function: Any) -> Any:
        return lambda *a, **k: (calls.append(name), function(*a, **k))[1]

    with pytest.MonkeyPatch.context() as patch:
        for where, name in ((batch_of_ranks, "all_gather"), (batch_of_ranks, "reduce_scatter"),
                            (dist, "all_reduce"), (dist, "batch_isend_irecv")):  # fmt: skip
            patch.setattr(where, name, spied(name, getattr(where, name)))
        yield calls


def as_in_one_process(group: Any) -> None:
    """Every loss and both gradients, of equal and unequal shares (one rank has none), in float64 and by the fused kernels."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    ways = [(name, call, {}) for name, call in {**GATHERED, **IN_A_RING, **ROWS}.items()]
    ways += [(name, call, {"ring": True}) for name, call in {**IN_A_RING, **ROWS}.items()]
    for counts, dtype in ((UNEQUAL[:ranks], F64), (EQUAL[:ranks], F64), (UNEQUAL[:ranks], torch.float32)):
        if (counts[0] == 2 or dtype != F64) and ranks < 4:
            continue
        for name, call, options in ways:
            batch, exact = whole_batch(sum(counts), dtype), whole_batch(sum(counts))
            exact = {k: x.detach().to(F64).requires_grad_(exact[k].requires_grad) if x.is_floating_point() else x
                     for k, x in batch.items()}  # fmt: skip
            expected = call(exact, None)
            mine = part(batch, counts, rank)
            loss = call(mine, group, **options)
            up, share = torch.ones_like(expected), ranks
            if expected.dim():
                up, share = torch.linspace(0.5, 2, sum(counts), dtype=F64), 1
            wanted = torch.autograd.grad(expected, (exact["s"], exact["t"]), up, allow_unused=True)
            upstream = rows_of(up, counts, rank).to(loss.dtype) if expected.dim() else None
            got = torch.autograd.grad(loss, (mine["s"], mine["t"]), upstream, allow_unused=True)
            share_of_largest = 1e-11 if dtype == F64 else 1e-5
            expected = rows_of(expected, counts, rank) if expected.dim() else expected
            message = f"{name}, {options}, {dtype}, {counts}: ".__add__
            largest = float(expected.detach().abs().amax()) if expected.numel() else 0
            torch.testing.assert_close(loss.to(F64), expected, rtol=0, atol=share_of_largest * largest, msg=message)
            for g, w, x in zip(got, wanted, (mine["s"], mine["t"])):
                if w is None:
                    assert g is None
                    continue
                assert g is not None and g.dtype == dtype and g.shape == x.shape, message(str(g))
                largest = float(share * w.abs().amax())
                torch.testing.assert_close(
                    g.to(F64), share * rows_of(w, counts, rank), rtol=0, atol=share_of_largest * largest, msg=message
                )


def without_a_group_nothing_travels(group: Any) -> None:
    """Nor in the modules, which take a group as the functions do."""
    batch = whole_batch(4)
    with counted() as calls:
        for call in {**GATHERED, **IN_A_RING, **ROWS}.values():
            call(batch, None).sum().backward()
        assert not calls
        kd.PKTLoss(group=group)(batch["s"], batch["t"])
        assert calls == ["all_gather"] * 3  # who has what, the student's, the teacher's
        calls.clear()
        kd.PKTLoss(group=group, ring=True)(batch["s"].detach(), batch["t"].detach())
        assert calls.count("batch_isend_irecv") == 2 * (dist.get_world_size(group) - 1)


def half_precision_is_rounded_once(group: Any) -> None:
    """And bfloat16 travels."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    for dtype in (torch.float16, torch.bfloat16):
        for ring in (False, True):
            batch = {k: x.detach().to(dtype) for k, x in whole_batch(2 * ranks).items() if k in "st"}
            exact = {k: x.to(F64).requires_grad_() for k, x in batch.items()}
            wanted = torch.autograd.grad(kd.similarity_preserving_loss(exact["s"], exact["t"]), exact["s"])[0]
            mine = part(batch, EQUAL[:ranks], rank)
            s = mine["s"].requires_grad_()
            loss = 1024 * kd.similarity_preserving_loss(s, mine["t"], group=group, ring=ring)
            got = torch.autograd.grad(loss, s)[0]
            wanted = rows_of(1024 * ranks * wanted, EQUAL, rank)
            torch.testing.assert_close(got, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-4)


def wrapped_students(group: Any) -> None:
    """DDP's and FSDP2's averages are the gradients of one process with the whole batch, the labels' term beside it."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    x, t, y = torch.randn(2 * ranks, 3, dtype=F64), torch.randn(2 * ranks, DT, dtype=F64), torch.arange(2 * ranks) % 4
    rows = slice(2 * rank, 2 * rank + 2)

    def loss(z: torch.Tensor, t: torch.Tensor, y: torch.Tensor, **options: Any) -> torch.Tensor:
        ring = {"ring": True} if options else {}
        return (
            torch.nn.functional.cross_entropy(z, y) + kd.rkd_loss(z, t, **options)
            + 3 * kd.similarity_preserving_loss(z, t, **options, **ring)
            + kd.info_nce_distillation_loss(z, t[:, :4], **options)
        )  # fmt: skip

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        layers = torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)
        return torch.nn.Sequential(*layers).to(F64)

    alone = model()
    loss(alone(x), t, y).backward()
    wanted = [p.grad for p in alone.parameters()]

    student = DistributedDataParallel(model(), process_group=group)
    loss(student(x[rows]), t[rows], y[rows], group=group).backward()
    torch.testing.assert_close([p.grad for p in student.parameters()], wanted)

    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    sharded = model()
    mesh = DeviceMesh.from_group(group, "cpu")
    fully_shard(sharded[0], mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    loss(sharded(x[rows]), t[rows], y[rows], group=group).backward()
    torch.testing.assert_close([p.grad.full_tensor() for p in sharded.parameters()], wanted)


def a_group_of_one(group: Any) -> None:
    if group is not dist.group.WORLD:
        return
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size(group))][dist.get_rank(group)]
    batch = whole_batch(5)
    for name, call in IN_A_RING.items():
        wanted = torch.autograd.grad(call(batch, None), batch["s"])[0]
        for options in ({}, {"ring": True}):
            torch.testing.assert_close(
                torch.autograd.grad(call(batch, alone, **options), batch["s"])[0], wanted, msg=name
            )


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return made


def a_ring_has_rows_only(group: Any) -> None:
    """Neither (N, D) nor (N, N), in the forward or the backward."""
    ranks, width, n = dist.get_world_size(group), 40, 10
    whole = ranks * n
    s, t = (torch.randn(n, width).requires_grad_() for _ in range(2))
    for name, call in IN_A_RING.items():
        if name in ("rkd_distance-labels", "rkd_distance-mask") or name.startswith("info_nce"):
            continue
        with Largest() as seen:
            call({"s": s, "t": t}, group, ring=True).backward()
        assert seen.elements <= n * max(whole, width), name
    with Largest() as seen:
        kd.info_nce_distillation_loss(s, t, group=group, ring=True).backward()
    assert seen.elements <= n * max(whole, width)
    with Largest() as seen:
        kd.similarity_preserving_loss(s, t, group=group).backward()
    assert seen.elements >= whole * width, "what this watches for"


def disagreement_is_an_error_on_every_rank(group: Any) -> None:
    rank = dist.get_rank(group)
    odd = rank == 1
    s, t = torch.zeros(2, DS), torch.zeros(2, DT)
    learning = s.clone().requires_grad_()
    elsewhere = ValueError, "rank 1 of the group has refused its input"
    for loss, here, there, error in (
        (kd.pkt_loss, (s, t), (torch.zeros(2, DS + 1), t), (ValueError, r"student must be alike .* \(N, 5\) .* on rank 0, \(N, 6\)")),
        (kd.pkt_loss, (s, t), (s, t.double()), (ValueError, r"teacher must be alike .* float32, .* float64")),
        (kd.rkd_angle_loss, (s, t), (learning, t), (ValueError, r"without a gradient on rank 0, .* with a gradient on rank 1")),
        (kd.pkt_loss, (s, t), (s, torch.zeros(3, DT)), elsewhere),
        (kd.crd_loss, (s, t, s, s, torch.zeros(2, 2).long()), (s, t, s, s, torch.zeros(2, 3).long()), (ValueError, "indices must be alike")),
        (kd.cross_image_relation_loss, (torch.zeros(1, 2, 2, 2),) * 2, (s, t), elsewhere),
        (kd.instance_relation_graph_loss, ([s, s], [t, t]), ([s], [t]), (ValueError, "rank 1 of the group calls something else|of the group calls")),
    ):  # fmt: skip
        kinds = (ValueError, TypeError) if odd and error is elsewhere else error[0]
        with pytest.raises(kinds, match="" if odd else error[1]):
            loss(*(there if odd else here), group=group)
    with pytest.raises(ValueError, match="the group calls something else"):
        (kd.pkt_loss if odd else kd.similarity_preserving_loss)(s, t, group=group)
    for options, words in (
        ({"mask": torch.ones(2, 2)}, r"mask must have one value a pair"),
        ({"ring": True, "mask": torch.ones(2, 2)}, r"mask must have one value a pair"),
        ({"labels": torch.zeros(2, 2)}, "labels must have one class a sample"),
        ({"labels": torch.zeros(3)}, "labels must have 2 samples"),
    ):
        with pytest.raises(ValueError, match=words):
            kd.rkd_distance_loss(s, t, group=group, **options)
    with pytest.raises(ValueError, match="ring=True is how the ranks of a group meet"):
        kd.pkt_loss(s, t, ring=True)
    with pytest.raises(ValueError, match="has no rows for ring=True"):
        kd.correlation_congruence_loss(s, s, kernel="neighbours", ring=True, group=group)
    with pytest.raises(ValueError, match="ring goes with the batch's negatives only"):
        kd.info_nce_distillation_loss(s, s, queue=s, ring=True, group=group)
    assert math.isfinite(kd.pkt_loss(s, t, group=group)), "and the ranks are in step still"


CHECKS = (
    as_in_one_process, without_a_group_nothing_travels, half_precision_is_rounded_once, wrapped_students, a_group_of_one,
    a_ring_has_rows_only, disagreement_is_an_error_on_every_rank,
)  # fmt: skip
