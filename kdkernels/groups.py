"""Losses of a batch whose samples are spread over a group's ranks: what they check, and how they come by all samples."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from kdkernels import checks

if TYPE_CHECKING:
    from kdkernels.distributed.batch import Samples


def batch(
    operation: str,
    student: torch.Tensor,
    teacher: torch.Tensor,
    group: torch.distributed.ProcessGroup | None,
    *,
    gather: bool = True,
    **others: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, Samples | None]:
    """`embeddings` of all samples of a group's ranks, and where they are; without a group of this process's, and None.

    Args:
        gather: False leaves the embeddings where they are: this rank's.
        others: what else has a first axis of samples, which the ranks are to agree on.
    """
    if group is None:
        return *checks.embeddings(student, teacher), None
    from kdkernels.distributed.batch import meet

    with refusing(group):
        student, teacher = checks.embeddings(student, teacher)
        for name, x in others.items():
            of_samples(name, x, student)
    samples = meet(operation, group, student=student, teacher=teacher, **others)
    if gather:
        student, teacher = samples.gather(student), samples.gather(teacher)
    return student, teacher, samples


def refusing(group: torch.distributed.ProcessGroup | None) -> contextlib.AbstractContextManager[None]:
    """Round checks: where they fail on this rank of a group, the others fail too instead of waiting for it."""
    if group is None:
        return contextlib.nullcontext()
    process_group(group)
    from kdkernels.distributed import batch

    return batch.refusing(group)


def process_group(group: Any) -> None:
    distributed = torch.distributed
    if not distributed.is_available():
        raise ValueError("group must be None: this torch has no torch.distributed")
    if not isinstance(group, distributed.ProcessGroup):
        if group is distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group must have this process in it: new_group said that it has not")
        raise TypeError(f"group must be a process group of torch.distributed, got {type(group).__name__}")


def meeting(group: Any) -> None:
    """A group, or None for all ranks."""
    if group is not None:
        process_group(group)
    elif not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise ValueError("group is all ranks by default, and there are none: call torch.distributed.init_process_group")


def of_samples(name: str, x: Any, like: torch.Tensor) -> None:
    """None, or a tensor with as many samples as `like`, beside it."""
    if x is None:
        return
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dim() == 0 or x.shape[0] != like.shape[0]:
        raise ValueError(f"{name} must have {like.shape[0]} samples in its first axis, got shape {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} with the embeddings, got {x.device}")


def ring(ring: bool, group: torch.distributed.ProcessGroup | None) -> None:
    checks.flag("ring", ring)
    if ring and group is None:
        raise ValueError("ring=True is how the ranks of a group meet: give a group")
