"""One batch whose samples are spread over the ranks of a group: who has which, and the exchanges of a loss between them.

Every exchange passes gradients on by its adjoint, so that a rank's gradient is that of the SUM of all ranks' losses
(kdkernels/distributed/README.md says what follows for DDP and FSDP). Ranks compare notes first: where they do not agree,
or one of them refuses its own input, all of them raise, instead of waiting for each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.bool,
)  # fmt: skip
SLOTS, AXES = 4, 5  # tensors of one meeting, and their axes after the samples'
FIELDS = 5 + AXES
REFUSED = UNKNOWN = -1
# Their names from torch 2.13 on, and before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclasses.dataclass(frozen=True)
class Samples:
    """Where the samples of a batch are, in the order of ranks."""

    group: Any
    rank: int
    counts: tuple[int, ...]

    @property
    def whole(self) -> int:
        return sum(self.counts)

    @property
    def own(self) -> slice:
        return self.of(self.rank)

    def of(self, rank: int) -> slice:
        """A rank's samples in the whole batch."""
        first = sum(self.counts[:rank])
        return slice(first, first + self.counts[rank])

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' x, joined along the samples; at least float32 where it has a gradient, which is rounded once."""
        return _Gather.apply(x, self) if _learns(x) else self._joined(x.detach())

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x, one shape everywhere."""
        return _Total.apply(x, self) if _learns(x) else self._added(x.detach())

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        """As many rows on every rank, which is what collectives take."""
        missing = max(self.counts) - x.shape[0]
        return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x.contiguous()

    def _joined(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.bool:
            return self._joined(x.byte()).bool()
        most = max(self.counts)
        everyone = x.new_empty(len(self.counts) * most, *x.shape[1:])
        if everyone.numel():
            all_gather(everyone, self._padded(x), group=self.group)
        if min(self.counts) == most:
            return everyone
        return torch.cat([part[:n] for part, n in zip(everyone.split(most), self.counts)])

    def _added(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=self.group)
        return x

    def _returned(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows of the sum of all ranks' x, which has the rows of the whole batch."""
        most = max(self.counts)
        if not x.numel():
            return x[self.own]
        if min(self.counts) < most:
            x = torch.cat([self._padded(part) for part in x.split(self.counts)])
        mine = x.new_empty(most, *x.shape[1:])
        reduce_scatter(mine, x.contiguous(), group=self.group)
        return mine[: self.counts[self.rank]]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, samples: Samples) -> torch.Tensor:
        ctx.samples, ctx.dtype = samples, x.dtype
        return samples._joined(x).to(torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.samples._returned(upstream).to(ctx.dtype), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, samples: Samples) -> torch.Tensor:
        ctx.samples = samples
        return samples._added(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.samples._added(upstream), None


def _learns(x: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _tell(group: Any, notes: list[int]) -> list[list[int]]:
    """Every rank's notes. The host waits for them, on the CPU where the group has a backend for it."""
    ranks = dist.get_world_size(group)
    kinds = [d.type for d in group._device_types]
    device = torch.device("cpu" if "cpu" in kinds else kinds[0])
    mine = torch.tensor(notes + [0] * (1 + SLOTS * FIELDS - len(notes)), device=device)
    everyone = mine.new_empty(ranks, len(mine))
    all_gather(everyone.view(-1), mine, group=group)
    return everyone.tolist()


def _notes(x: torch.Tensor | None) -> list[int]:
    if x is None:
        return [0] * FIELDS
    axes = [*x.shape[1:AXES], x.shape[AXES:].numel()]
    axes += [1] * (AXES - len(axes))
    dtype = DTYPES.index(x.dtype) if x.dtype in DTYPES else UNKNOWN
    return [1, x.shape[0], dtype, x.dim(), int(_learns(x)), *axes]


def _words(notes: list[int]) -> str:
    given, _, dtype, dim, learns, *axes = notes
    if not given:
        return "none"
    shape = ", ".join(["N", *map(str, axes[: dim - 1])])
    kind = "another dtype" if dtype == UNKNOWN else str(DTYPES[dtype]).removeprefix("torch.")
    return f"({shape}) in {kind}, {'with' if learns else 'without'} a gradient"


@contextlib.contextmanager
def refusing(group: Any) -> Iterator[None]:
    """Round the checks of this rank's own input: where they raise, the ranks that wait in `meet` raise too."""
    try:
        yield
    except (TypeError, ValueError, IndexError):
        _tell(group, [REFUSED])
        raise


def meet(operation: str, group: Any, **tensors: torch.Tensor | None) -> Samples:
    """Who has how many samples, the first axis of every tensor. One collective, for whose result the host waits.

    Raises:
        ValueError: on all ranks, where they differ in the loss, in which tensors there are, or in a tensor's other axes,
            dtype or whether it has a gradient; or where a rank has refused its input; or this process is not in the group.
    """
    if dist.get_rank(group) < 0:
        raise ValueError(f"{operation}: this process is not in the group")
    name = zlib.crc32(operation.encode())
    everyone = _tell(group, [name, *(n for x in tensors.values() for n in _notes(x))])
    for rank, notes in enumerate(everyone):
        if notes[0] == REFUSED:
            raise ValueError(f"{operation}: rank {rank} of the group has refused its input, and says why there")
        if notes[0] != name:
            raise ValueError(
                f"{operation}: rank {rank} of the group calls something else: ranks must compute the same losses in the same order"
            )
    counts: tuple[int, ...] | None = None
    for slot, tensor in enumerate(tensors):
        at = 1 + slot * FIELDS
        given = [notes[at : at + FIELDS] for notes in everyone]
        for rank, notes in enumerate(given):
            if notes[:1] + notes[2:] != given[0][:1] + given[0][2:]:
                raise ValueError(
                    f"{tensor} must be alike on all ranks of the group but for the number of samples: "
                    f"{_words(given[0])} on rank 0, {_words(notes)} on rank {rank}"
                )
        if counts is None and given[0][0]:
            counts = tuple(notes[1] for notes in given)
    assert counts is not None, "somebody must bring samples"
    return Samples(group, dist.get_rank(group), counts)
