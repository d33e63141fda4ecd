"""Losses against a teacher that is known at a few classes only."""

from __future__ import annotations

import math

import torch

from kdkernels import backends, checks
from kdkernels.losses.module import LossModule
from kdkernels.losses.rows import reduced, row_weights
from kdkernels.ops.row_divergence.kinds import Kind
from kdkernels.ops.row_divergence.reference import divergence as divergence_of
from kdkernels.ops.row_gather.op import row_gather
from kdkernels.ops.row_gather.support import Treatment
from kdkernels.ops.scalars import Number

MISSING = ("renormalize", "renormalize_both", "none", "tail", "uniform")
DIVERGENCES = {"forward_kl": Kind.FORWARD_KL, "reverse_kl": Kind.REVERSE_KL, "js": Kind.JSD}
TEACHER_VALUES = ("logits", "log_probs")


def topk_div(
    student_logits: torch.Tensor,
    teacher_values: torch.Tensor,
    teacher_indices: torch.Tensor,
    *,
    missing: str = "renormalize",
    divergence: str = "forward_kl",
    teacher_values_are: str = "logits",
    min_log_prob: float | None = None,
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    scale_by_t2: bool = True,
    dim: int = -1,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Divergence of a student from a teacher that is given at k classes a row.

    T^2 D(p_t, p_s), p_s = softmax(student_logits / T). The teacher is q_i at the classes i of `teacher_indices`, the
    support I, and `missing` says what holds elsewhere, for teacher and student:

    - "renormalize": q is divided by its sum and is 0 outside I; p_s is over all V classes. With "js" the student's
      mass outside I adds log(2) / 2 times itself; "reverse_kl" would be infinite and is refused.
    - "renormalize_both": p_s is divided by its sum over I too; what the student does outside I does not matter.
    - "none": neither; terms are summed over I alone. This is no divergence: it may be negative, and it is least
      where p_s exceeds q.
    - "tail": all classes outside I are one more class, with mass 1 - sum q for the teacher and the exact sum of the
      others for the student, however little that is.
    - "uniform": the teacher's 1 - sum q is spread evenly over the V - k others. Forward KL only.

    The student is read once for the loss and once for its gradient, which is the only thing as large that is made.

    Args:
        student_logits: scores, float16, bfloat16, float32 or float64, (..., V).
        teacher_values: (..., k), 1 <= k <= V, of any of these dtypes, on the same device. They get a gradient if they
            require one. What stands at an index of -1 is not looked at.
        teacher_indices: integers (..., k), in any order: the classes of the values. They may be the teacher's top k,
            the student's, or both (`union_support`). -1 leaves an entry out. A class that occurs twice in a row counts
            twice in sums over I, and once where what is outside I is measured.
        missing: "renormalize", "renormalize_both", "none", "tail" or "uniform".
        divergence: "forward_kl", "reverse_kl" or "js".
        teacher_values_are: "logits", or "log_probs": normalised over all V classes and already at their temperature,
            which "none", "tail" and "uniform" need, since k logits do not tell the teacher's mass.
        min_log_prob: with missing="none", the log-probabilities of both are raised to this; no gradient below.
        temperature: T > 0, a number or a tensor with one element. It may require a gradient; the backward then makes
            temporaries of the logits' size in float32.
        teacher_temperature: the teacher's own T, for logits; default: the student's.
        scale_by_t2: multiply by the square of the student's temperature.
        dim: the class axis; only the last one.
        reduction: "rowmean" divides by the sum of row weights, "batchmean" by student_logits.size(0), "mean" by
            the number of elements of student_logits, "sum" by nothing; "none" gives one value a row.
        weight: a weight (or boolean mask) for every row: the shape of the logits without the class axis.
        labels: integers of that shape; a row where they equal `ignore_index` is left out.
        ignore_index: the label that leaves a row out.
        num_items: divides the sum instead of what `reduction` says.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 if an input is float64), or one value a row. If all rows are left out: 0, with zero
        gradients. A row whose indices are all -1 counts, with loss 0 under "renormalize" (forward), "renormalize_both"
        and "none". Where the teacher has mass and the student has none, forward KL is +inf. A teacher's mass outside
        I below the rounding of its dtype (1e-7) counts as none.

    Raises:
        ValueError: shapes or devices that differ, k > V, a `dim` that is not the last, options that exclude each other,
            a temperature that is not positive.
        TypeError: integer logits, indices or labels that are not integers.
        IndexError: an index outside -1..V-1, a label outside 0..V-1 (on a GPU: NaN in that row, also in its gradient,
            unless KDKERNELS_DEBUG=1).
        BackendError: the backend asked for cannot run here.

    Against others: DistillKit's "zero" is "renormalize" and its "symmetric uniform" is "tail"; TRL's top-k losses are
    "renormalize_both", with its tail option "tail"; verl's is "none", its clamp `min_log_prob`. These have no T^2
    (`scale_by_t2=False`).
    """
    checks.flag("scale_by_t2", scale_by_t2)
    treatment = treatment_of(missing, divergence, teacher_values_are, min_log_prob, teacher_temperature)
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    checks.temperatures(temperature, teacher_temperature, student_logits, learnable=True)
    checks.items(num_items, student_logits)
    checks.float_tensor("student_logits", student_logits)
    if student_logits.dim() == 0 or student_logits.shape[-1] == 0:
        raise ValueError(f"student_logits must have at least one class, got shape {tuple(student_logits.shape)}")
    checks.integer("dim", dim)
    if dim not in (-1, student_logits.dim() - 1):
        raise ValueError(f"dim must be the last axis (-1) for a sparse teacher, got {dim}")
    rows, classes, device = tuple(student_logits.shape[:-1]), student_logits.shape[-1], student_logits.device
    indices = support_of("student_logits", student_logits, classes, teacher_values, teacher_indices)
    weight = checks.per_row("weight", weight, rows, device)
    labels = checks.labels_of(labels, rows, classes, ignore_index, device)
    backend = backends.resolve("topk_div", (student_logits, teacher_values), backend)

    dtype = torch.float64 if torch.float64 in (student_logits.dtype, teacher_values.dtype) else torch.float32
    student = student_logits.double() if dtype == torch.float64 else student_logits
    # What follows the kernels is small: in float64 nothing is lost there.
    small = dtype if backend == "reference" else torch.float64
    w = row_weights(weight, labels, ignore_index, small)
    live = None if w is None else w != 0
    t_t = temperature if teacher_temperature is None else teacher_temperature
    indices, b = teacher_of(treatment, teacher_values, indices, live, teacher_values_are, t_t, classes, small, dtype)
    a, rest, total = (
        None if x is None else x.to(small)
        for x in row_gather(
            student, indices, temperature=temperature, live=live, outside=treatment.outside, backend=backend
        )
    )
    assert a is not None
    a = treatment.student(a, rest, total, indices, classes)
    losses = divergence_of(treatment.kind, a, b, 0.5, 0.0)
    if w is not None and live is not None:
        losses = (w * losses).where(live, 0.0)
    if labels is not None and live is not None:
        bad = live & ((labels < 0) | (labels >= classes))
        losses = losses * torch.ones_like(losses).masked_fill(bad, math.nan)
    if scale_by_t2:
        losses = losses * temperature**2
    return reduced(losses, w, reduction, student_logits, num_items).to(dtype)


def treatment_of(
    missing: str, divergence: str, values_are: str, min_log_prob: float | None, teacher_temperature: Number | None
) -> Treatment:
    """The options that say what the loss is, checked, also against one another."""
    checks.choice("missing", missing, MISSING)
    checks.choice("divergence", divergence, tuple(DIVERGENCES))
    checks.choice("teacher_values_are", values_are, TEACHER_VALUES)
    if missing == "renormalize" and divergence == "reverse_kl":
        raise ValueError(
            "reverse_kl is infinite where the teacher has no mass, which missing='renormalize' says of all classes but k; "
            "choose 'renormalize_both', 'tail' or 'none'"
        )
    if missing == "uniform" and divergence != "forward_kl":
        raise ValueError(f"missing='uniform' goes with divergence='forward_kl' only, got {divergence!r}; choose 'tail'")
    if values_are == "logits" and missing in ("none", "tail", "uniform"):
        raise ValueError(
            f"missing={missing!r} needs the teacher's mass: pass log-probabilities and teacher_values_are='log_probs'"
        )
    if values_are == "log_probs" and teacher_temperature is not None:
        raise ValueError("teacher_temperature is for logits: log_probs are already at their temperature")
    if min_log_prob is not None:
        if missing != "none":
            raise ValueError(f"min_log_prob goes with missing='none' only, got missing={missing!r}")
        checks.plain_number("min_log_prob", min_log_prob, high=0)
    return Treatment(missing, DIVERGENCES[divergence], min_log_prob)


def support_of(
    name: str, student: torch.Tensor, classes: int, values: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """Validates a teacher of the student's rows, which `name` has; returns the indices as int64."""
    checks.float_tensor("teacher_values", values)
    if not isinstance(indices, torch.Tensor):
        raise TypeError(f"teacher_indices must be a tensor, got {type(indices).__name__}")
    checks.dense("teacher_indices", indices)
    if indices.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(
            f"teacher_indices must hold class indices (int64), got {str(indices.dtype).removeprefix('torch.')}"
        )
    if indices.shape != values.shape:
        raise ValueError(
            f"teacher_values and teacher_indices must have the same shape: {tuple(values.shape)} and {tuple(indices.shape)}"
        )
    if values.dim() != student.dim() or values.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            "student and teacher must have the same rows: "
            f"{name} has shape {tuple(student.shape)} and teacher_values {tuple(values.shape)}"
        )
    k = values.shape[-1]
    if not 1 <= k <= classes:
        raise ValueError(
            f"teacher_values must have between 1 and {classes} entries a row (the student's classes), got {k}"
        )
    for what, x in (("teacher_values", values), ("teacher_indices", indices)):
        if x.device != student.device:
            raise ValueError(f"{what} must be on {student.device} with {name}, got {x.device}")
    indices = indices.long()
    checks.indices("teacher_indices", indices, classes, padding=-1)
    return indices


def teacher_of(
    treatment: Treatment,
    values: torch.Tensor,
    indices: torch.Tensor,
    live: torch.Tensor | None,
    values_are: str,
    temperature: Number,
    classes: int,
    small: torch.dtype,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the indices in ascending order, the teacher's entries of the loss in `small`)."""
    # The kernels walk a row's classes and its indices side by side; the order of the k says nothing.
    indices, order = indices.sort(dim=-1, stable=True)
    valid = indices != -1
    kept = valid if live is None else valid & live.unsqueeze(-1)
    b = values.gather(-1, order).to(small).where(kept, 0.0)
    if values_are == "logits":
        b = b / temperature
    b = b.masked_fill(~valid, -math.inf)
    return indices, treatment.teacher(b, indices, classes, torch.finfo(dtype).eps)


def union_support(student_logits: torch.Tensor, teacher_indices: torch.Tensor, k: int) -> torch.Tensor:
    """The classes in the teacher's support or among the student's k largest, for `topk_div`.

    Args:
        student_logits: (..., V).
        teacher_indices: int64 (..., j); -1 is no class.
        k: how many of the student's, at most V.

    Returns:
        int64 (..., min(j + k, V)): each class once, descending, then -1.

    Raises:
        ValueError: rows or devices that differ, k above V.
        TypeError: scores that are not floating point, indices that are not int64.
    """
    checks.float_tensor("student_logits", student_logits)
    if student_logits.dim() == 0:
        raise ValueError("student_logits must have a class axis, got a 0-d tensor")
    if not isinstance(teacher_indices, torch.Tensor) or teacher_indices.dtype != torch.int64:
        kind = teacher_indices.dtype if isinstance(teacher_indices, torch.Tensor) else type(teacher_indices).__name__
        raise TypeError(f"teacher_indices must be a tensor of int64, got {kind}")
    checks.dense("teacher_indices", teacher_indices)
    checks.same_device(student_logits=student_logits, teacher_indices=teacher_indices)
    if student_logits.dim() != teacher_indices.dim() or student_logits.shape[:-1] != teacher_indices.shape[:-1]:
        raise ValueError(
            "student_logits and teacher_indices must have the same rows: "
            f"{tuple(student_logits.shape)} and {tuple(teacher_indices.shape)}"
        )
    checks.integer("k", k, low=0)
    if k > student_logits.shape[-1]:
        raise ValueError(f"k must be at most the number of classes, {student_logits.shape[-1]}, got {k}")
    both = torch.cat([teacher_indices, student_logits.topk(k, -1).indices], -1).sort(-1).values
    again = torch.cat([torch.zeros_like(both[..., :1], dtype=torch.bool), both[..., 1:] == both[..., :-1]], -1)
    classes = student_logits.shape[-1]
    return both.masked_fill(again, -1).sort(-1, descending=True).values[..., :classes]


class TopKDivLoss(LossModule):
    """`topk_div` as a module: TopKDivLoss(missing="tail")(student_logits, teacher_values, teacher_indices)."""

    function = staticmethod(topk_div)
