"""DIST: match the correlations of predictions instead of the predictions."""

from __future__ import annotations

import torch

from kdkernels import checks, groups
from kdkernels.losses.module import LossModule
from kdkernels.ops.dist.op import dist
from kdkernels.ops.scalars import Number


def dist_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: Number = 1.0,
    beta: Number = 1.0,
    gamma: Number = 1.0,
    scale_by_t2: bool = False,
    eps: float = 1e-8,
    clamp_norms: bool = False,
    dim: int = -1,
    weight: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    group: torch.distributed.ProcessGroup | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Inter-class and intra-class relations of a student and a teacher.

    beta (1 - mean_n r(p_s[n, :], p_t[n, :])) + gamma (1 - mean_v r(p_s[:, v], p_t[:, v])), p = softmax(logits / T)
    and r Pearson's correlation: Huang, You, Wang, Qian and Xu (2022, arXiv:2205.10536). The rows n are all that is
    not the class axis. Where either side of a correlation is constant, it is 0 and has no gradient.

    Args:
        student_logits: scores, float16, bfloat16, float32 or float64, (..., V) or with the class axis at `dim`.
        teacher_logits: the same shape on the same device; the dtype may differ. Gets a gradient if it requires one.
        temperature: T > 0, a number or a tensor with one element. It gets no gradient.
        beta: the weight of the rows' term, a number or a tensor with one element.
        gamma: the weight of the columns' term, likewise. With one valid row that term is 0.
        scale_by_t2: multiply by T^2. Not in the paper; see below.
        eps: what keeps a small norm from dividing.
        clamp_norms: r = x.y / (max(|x|, eps) max(|y|, eps)) instead of x.y / (|x| |y| + eps).
        dim: the class axis.
        weight: a weight (or boolean mask) for every row: the shape of the logits without the class axis. The rows'
            term is the weighted mean and the columns' correlations are weighted; a row of weight 0 is in neither,
            and one of weight 2 counts as two.
        labels: integers of that shape; a row where they equal `ignore_index` is left out of both terms.
        ignore_index: the label that leaves a row out.
        group: the ranks whose rows are one batch, of which logits, weight and labels are this rank's, as many as it has; default:
            this process's alone. Values and gradients: kdkernels/distributed/README.md.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs); 0, with zero gradients, if all rows are left out. There is
        no `reduction`: a column's correlation belongs to the whole batch, and a NaN in a row is in every gradient.

    Raises:
        ValueError: shapes, class counts or devices that differ, a temperature or eps that is not positive, an option
            that requires grad.
        TypeError: integer logits, labels that are not integers.
        IndexError: a label outside 0..V-1 (on a GPU: the loss is NaN, unless KDKERNELS_DEBUG=1).
        BackendError: the backend asked for cannot run here.

    Against others: the authors' code and mmrazor's DISTLoss multiply by T^2 (`scale_by_t2=True`); some recipes
    have beta = gamma = 2. torchdistill's DISTLoss uses torch's cosine_similarity (`clamp_norms=True`).
    """
    with groups.refusing(group):
        dim = checks.scores("student_logits", student_logits, "teacher_logits", teacher_logits, dim)
        shape, classes, device = student_logits.shape, student_logits.shape[dim], student_logits.device
        rows = tuple(shape[:dim] + shape[dim + 1 :])
        weight = checks.per_row("weight", weight, rows, device)
        ignore_index = checks.integer("ignore_index", ignore_index)
        labels = checks.labels_of(labels, rows, classes, ignore_index, device)
    checks.number("temperature", temperature, low=0, open_low=True, like=student_logits)
    checks.number("beta", beta, like=student_logits)
    checks.number("gamma", gamma, like=student_logits)
    checks.plain_number("eps", eps, low=0, open_low=True)
    checks.flag("scale_by_t2", scale_by_t2)
    checks.flag("clamp_norms", clamp_norms)
    if group is not None:
        from kdkernels.distributed.batch import meet

        by_row = [
            x.movedim(dim, -1).flatten(0, -2) if x.dim() > 1 else x[None] for x in (student_logits, teacher_logits)
        ]
        of_rows = [None if x is None else x.reshape(-1) for x in (weight, labels)]
        samples = meet(
            "dist_loss", group, student_logits=by_row[0], teacher_logits=by_row[1], weight=of_rows[0], labels=of_rows[1]
        )
        student_logits, teacher_logits = (samples.gather(x) for x in by_row)
        weight, labels = (None if x is None else samples.gather(x) for x in of_rows)
        dim = -1
    return dist(
        student_logits,
        teacher_logits,
        temperature=temperature,
        beta=beta,
        gamma=gamma,
        scale_by_t2=scale_by_t2,
        eps=eps,
        clamp=clamp_norms,
        dim=dim,
        weight=weight,
        labels=labels,
        ignore_index=ignore_index,
        backend=backend,
        operation="dist_loss",
    )


class DISTLoss(LossModule):
    """`dist_loss` as a module: DISTLoss(beta=2.0, gamma=2.0)(student_logits, teacher_logits)."""

    function = staticmethod(dist_loss)
