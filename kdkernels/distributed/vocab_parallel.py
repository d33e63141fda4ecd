"""Distillation between logits or heads whose vocabulary is spread over the ranks of a group; shards.py computes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from kdkernels import backends, checks, groups
from kdkernels.distributed.shards import Job, ShardedLoss, of_heads, of_logits
from kdkernels.losses.logits import soft_term
from kdkernels.ops.row_divergence.kinds import Kind
from kdkernels.ops.scalars import Number


def _local(name: str, x: Any, axis: int, group: Any, start: int | None) -> tuple[torch.Tensor, Any, int | None]:
    """This rank's shard of a DTensor, its group and its first class; a plain tensor is a shard already."""
    if not hasattr(x, "placements"):
        return x, group, start
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded = [i for i, p in enumerate(x.placements) if isinstance(p, Shard)]
    if len(sharded) != 1 or x.placements[sharded[0]].dim % x.dim() != axis % x.dim():
        raise ValueError(f"{name} must be sharded along its class axis and no other, got {x.placements}")
    _, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    return x.to_local(), x.device_mesh.get_group(sharded[0]), offset[axis]


def _whole(x: Any) -> Any:
    """A replicated DTensor's tensor; anything else as it is."""
    return x.to_local() if hasattr(x, "placements") else x


def _finish(
    make: Any, tensors: tuple[Any, ...], rows: tuple[int, ...], classes: int, deferred: bool, labels: torch.Tensor | None,
    temperature: Number, alpha: Number, divergence: str, divergence_options: Mapping[str, Number] | None,
    teacher_temperature: Number | None, scale_by_t2: bool, reduction: str, weight: torch.Tensor | None, ignore_index: int,
    num_items: Number | None, chunk_bytes: int, vocab_start: int | None, group: Any, backend: str, operation: str,
) -> torch.Tensor:  # fmt: skip
    given = [x for x in tensors if x is not None]
    like = given[0]
    kind, (p0, p1) = soft_term(divergence, divergence_options, like)
    if kind == Kind.DECOUPLED_KL:
        raise ValueError("divergence='decoupled_kl' is not available over a sharded vocabulary")
    checks.temperatures(temperature, teacher_temperature, like)
    checks.number("alpha", alpha, low=0, high=1, like=like)
    checks.items(num_items, like)
    checks.flag("scale_by_t2", scale_by_t2)
    checks.integer("chunk_bytes", chunk_bytes, low=0)
    if vocab_start is not None:
        checks.integer("vocab_start", vocab_start, low=0)
    groups.meeting(group)
    checks.choice("reduction", reduction, ("rowmean", "batchmean", "sum", "none"))
    hard = labels is not None and not (checks.real(alpha) and alpha == 1)
    if labels is None and checks.real(alpha) and alpha != 1:
        raise TypeError("labels must be a tensor where alpha is below 1: the hard-label term needs them")
    backend = backends.resolve(operation, tuple(given), backend)
    device = like.device
    if any(x.device != device for x in given):
        raise ValueError(f"student and teacher must be on one device, got {', '.join(str(x.device) for x in given)}")
    ranks = dist.get_world_size(group)
    start = dist.get_rank(group) * classes if vocab_start is None else vocab_start
    dtype = torch.float64 if torch.float64 in [x.dtype for x in given] else torch.float32
    weight = checks.per_row("weight", weight, rows, device)
    # Classes of other ranks are not known here: this many where all shards are alike.
    known = vocab_start is None and classes > 0
    labels = checks.labels_of(labels, rows, classes * ranks if known else 2**62, ignore_index, device)
    w = torch.ones(rows, dtype=dtype, device=device) if weight is None else weight.detach().to(dtype)
    if labels is not None:
        w = w.masked_fill(labels == ignore_index, 0.0)
        labels = labels.masked_fill(labels == ignore_index, 0).reshape(-1)
    w = w.reshape(-1)
    divisor: Number | torch.Tensor = 1.0
    if reduction != "none":
        by = {"sum": 1.0, "batchmean": max(rows[0], 1) if rows else 1.0, "rowmean": w.sum()}
        divisor = by[reduction] if num_items is None else num_items
    if isinstance(divisor, torch.Tensor):
        divisor = divisor.detach().to(device, dtype)
        share: Any = (divisor != 0).to(dtype) / divisor.where(divisor != 0, 1.0)
    else:
        share = 1.0 / divisor
    kd = share * alpha * (temperature**2 if scale_by_t2 else 1.0)
    job = Job(
        kind, p0, p1, temperature, temperature if teacher_temperature is None else teacher_temperature, kd,
        share * (1 - alpha) if hard else None, start, group, backend, chunk_bytes,
    )  # fmt: skip
    loss = ShardedLoss.apply(job, make, deferred or reduction == "none", reduction != "none", labels, w, *tensors)
    return loss.view(rows) if reduction == "none" else loss


def vocab_parallel_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    temperature: Number = 1.0,
    alpha: Number = 1.0,
    *,
    divergence: str = "forward_kl",
    divergence_options: Mapping[str, Number] | None = None,
    teacher_temperature: Number | None = None,
    scale_by_t2: bool = True,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    vocab_start: int | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_bytes: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """distillation_loss of logits whose last axis is spread over a group: (1 - alpha) CE + alpha T^2 divergence.

    Every rank calls it with its shard and gets the loss of the whole vocabulary, and the gradient of its shard.

    Args:
        student_logits: (..., V_local), float16, bfloat16, float32 or float64; or a DTensor sharded along its last axis. A rank
            may have no class at all.
        teacher_logits: the same shard of the teacher's.
        labels: indices into the whole vocabulary; they mask rows, and are the targets where alpha is below 1.
        temperature, divergence, divergence_options, teacher_temperature, scale_by_t2, weight, ignore_index, num_items: as
            distillation_loss; every divergence but "decoupled_kl". The same on all ranks.
        alpha: the divergence's weight; 1, the default, leaves the cross-entropy out.
        reduction: "rowmean", "batchmean", "sum" or "none". Where the tokens are spread too, see `count_items`.
        vocab_start: this rank's first class; default: its rank times V_local, all shards being alike. A DTensor knows it.
        group: the ranks that share the vocabulary; default: all. A DTensor knows it.
        chunk_bytes: memory for float32 copies of a chunk of rows; 0 chooses.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 logits), or one value a row; the same on all ranks.

    Raises:
        ValueError, TypeError, IndexError, BackendError: as distillation_loss.
    """
    start = vocab_start
    student_logits, group, start = _local("student_logits", student_logits, -1, group, start)
    teacher_logits, group, start = _local("teacher_logits", teacher_logits, -1, group, start)
    checks.float_tensor("student_logits", student_logits)
    checks.float_tensor("teacher_logits", teacher_logits)
    if student_logits.dim() == 0 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student_logits and teacher_logits must be the same shard, (..., V_local): "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    rows, classes = tuple(student_logits.shape[:-1]), student_logits.shape[-1]
    flat = (
        student_logits.reshape(math.prod(rows), classes),
        teacher_logits.reshape(math.prod(rows), classes),
    )
    return _finish(
        of_logits, flat, rows, classes, torch.float16 in (student_logits.dtype, teacher_logits.dtype), labels, temperature,
        alpha, divergence, divergence_options, teacher_temperature, scale_by_t2, reduction, weight, ignore_index, num_items,
        chunk_bytes, start, group, backend, "vocab_parallel_loss",
    )  # fmt: skip


def vocab_parallel_linear_loss(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    labels: torch.Tensor | None = None,
    temperature: Number = 1.0,
    alpha: Number = 1.0,
    *,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    student_logit_scale: Number | None = None,
    teacher_logit_scale: Number | None = None,
    student_softcap: Number | None = None,
    teacher_softcap: Number | None = None,
    divergence: str = "forward_kl",
    divergence_options: Mapping[str, Number] | None = None,
    teacher_temperature: Number | None = None,
    scale_by_t2: bool = True,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    vocab_start: int | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_bytes: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """vocab_parallel_loss from hidden states, which every rank has, and heads of which every rank has some classes.

    Args:
        student_hidden: (..., H_s), the same on all ranks; their gradient is that of the whole vocabulary.
        student_weight: (V_local, H_s), this rank's rows; or a DTensor sharded along its first axis.
        teacher_hidden, teacher_weight: (..., H_t) and (V_local, H_t).
        student_bias, teacher_bias: (V_local,).
        student_logit_scale, teacher_logit_scale, student_softcap, teacher_softcap: as linear_kl_div.

    The other arguments, the result and the errors are vocab_parallel_loss's; float64 is not available.
    """
    start = vocab_start
    student_weight, group, start = _local("student_weight", student_weight, 0, group, start)
    teacher_weight, group, start = _local("teacher_weight", teacher_weight, 0, group, start)
    if student_bias is not None:
        student_bias = _local("student_bias", student_bias, 0, group, start)[0]
    if teacher_bias is not None:
        teacher_bias = _local("teacher_bias", teacher_bias, 0, group, start)[0]
    student_hidden, teacher_hidden = _whole(student_hidden), _whole(teacher_hidden)
    for name, x in (("student_hidden", student_hidden), ("student_weight", student_weight),
                    ("teacher_hidden", teacher_hidden), ("teacher_weight", teacher_weight)):  # fmt: skip
        checks.float_tensor(name, x)
        if x.dtype == torch.float64:
            raise TypeError(f"{name} must be float16, bfloat16 or float32, got float64")
    for model, hidden, head in (
        ("student", student_hidden, student_weight),
        ("teacher", teacher_hidden, teacher_weight),
    ):
        if head.dim() != 2 or hidden.dim() == 0 or head.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"{model}_weight must have shape (V_local, {hidden.shape[-1] if hidden.dim() else 'H'}), got {tuple(head.shape)}"
            )
    for name, bias, head in (
        ("student_bias", student_bias, student_weight), ("teacher_bias", teacher_bias, teacher_weight),
    ):  # fmt: skip
        if bias is not None:
            checks.float_tensor(name, bias)
            if tuple(bias.shape) != (head.shape[0],):
                raise ValueError(f"{name} must have shape ({head.shape[0]},), got {tuple(bias.shape)}")
    if student_weight.shape[0] != teacher_weight.shape[0] or student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            "student and teacher must have the same tokens and the same shard of the vocabulary: hidden states "
            f"{tuple(student_hidden.shape)} and {tuple(teacher_hidden.shape)}, heads {tuple(student_weight.shape)} and "
            f"{tuple(teacher_weight.shape)}"
        )
    checks.number("student_logit_scale", student_logit_scale, optional=True, like=student_hidden)
    checks.number("teacher_logit_scale", teacher_logit_scale, optional=True, like=student_hidden)
    checks.number("student_softcap", student_softcap, low=0, open_low=True, optional=True, like=student_hidden)
    checks.number("teacher_softcap", teacher_softcap, low=0, open_low=True, optional=True, like=student_hidden)

    def make(tensors: Any, wants: list[bool]) -> Any:
        return of_heads(tensors, wants, (student_logit_scale, student_softcap, teacher_logit_scale, teacher_softcap))

    tensors = (
        student_hidden.reshape(-1, student_hidden.shape[-1]), student_weight, student_bias, None,
        teacher_hidden.reshape(-1, teacher_hidden.shape[-1]), teacher_weight, teacher_bias, None,
    )  # fmt: skip
    return _finish(
        make, tensors, tuple(student_hidden.shape[:-1]), student_weight.shape[0], False, labels, temperature, alpha,
        divergence, divergence_options, teacher_temperature, scale_by_t2, reduction, weight, ignore_index, num_items,
        chunk_bytes, start, group, backend, "vocab_parallel_linear_loss",
    )  # fmt: skip
