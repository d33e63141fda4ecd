"""Losses between models that learn together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kdkernels import checks
from kdkernels.losses.module import LossModule
from kdkernels.ops.peer_divergence.op import peer_divergence
from kdkernels.ops.scalars import Number

PAIRS = ("paper", "pair_sum", "mean")


def _peers(
    logits: torch.Tensor | Sequence[torch.Tensor], dim: int
) -> tuple[torch.Tensor | list[torch.Tensor], torch.Tensor, int]:
    """The scores as the operator takes them, one learner's, and the class axis of those, non-negative."""
    if isinstance(logits, torch.Tensor):
        checks.float_tensor("logits", logits)
        if logits.dim() < 2:
            raise ValueError(f"logits must be (peers, ..., classes), got shape {tuple(logits.shape)}")
        if logits.shape[0] == 0:
            raise ValueError(f"logits must hold at least one peer on their first axis, got shape {tuple(logits.shape)}")
        one = logits[0]
        return logits, one, checks.scores("logits[0]", one, "logits[0]", one, dim)
    if not isinstance(logits, (list, tuple)):
        raise TypeError(f"logits must be a tensor or a list of tensors, got {type(logits).__name__}")
    peers = list(logits)
    if not peers:
        raise ValueError("logits must hold at least one peer, got an empty list")
    checks.float_tensor("logits[0]", peers[0])
    for i, x in enumerate(peers):
        checks.float_tensor(f"logits[{i}]", x)
        if x.shape != peers[0].shape:
            raise ValueError(
                f"all peers must have one shape: logits[0] has {tuple(peers[0].shape)} and logits[{i}] {tuple(x.shape)}"
            )
        if x.device != peers[0].device:
            raise ValueError(
                f"all peers must be on one device: logits[0] is on {peers[0].device}, logits[{i}] on {x.device}"
            )
    dim = checks.scores("logits[0]", peers[0], "logits[0]", peers[0], dim)
    dtype = peers[0].dtype
    for x in peers[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in peers], peers[0], dim


def mutual_kl_div(
    logits: torch.Tensor | Sequence[torch.Tensor],
    *,
    temperature: Number = 1.0,
    scale_by_t2: bool = True,
    pairs: str = "paper",
    dim: int = -1,
    reduction: str = "rowmean",
    weight: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Deep mutual learning: every model is drawn to the predictions of its peers.

    sum_i 1/(M-1) sum_{j != i} T^2 KL(p_j, p_i), p = softmax(logits / T), with p_j constant in the term of
    learner i: Zhang, Xiang, Hospedales and Lu (2018, arXiv:1706.00384), who have T = 1. Add each model's own
    cross-entropy for their whole loss. All M (M-1) pairs are one pass over the scores; the gradient of learner
    i is T (p_i - mean of the others) before the reduction's division.

    Args:
        logits: the scores of M >= 1 models, float16, bfloat16, float32 or float64: one tensor (M, ..., V), or a
            list of M tensors (..., V) on one device. A list is not stacked, unless it has more than 16 members;
            members of other dtypes are converted to the widest.
        temperature: T > 0, a number or a tensor with one element. It gets no gradient.
        scale_by_t2: multiply by T^2.
        pairs: the weight of a pair. "paper": 1/(M-1), each learner's mean over its peers, summed over learners;
            "pair_sum": 1, the sum over all ordered pairs; "mean": 1/(M (M-1)), the mean over them. One and the
            same learner, M = 1, has loss 0.
        dim: the class axis of one model's scores.
        reduction: over the rows of one model's scores. "rowmean" divides by the sum of row weights, "batchmean"
            by their size(0), "mean" by their number of elements, "sum" by nothing; "none" gives the loss of
            every learner on every row, (M, ...).
        weight: a weight (or boolean mask) for every row, the same for all learners: the shape of one model's
            scores without the class axis.
        labels: integers of that shape; a row where they equal `ignore_index` is left out.
        ignore_index: the label that leaves a row out.
        num_items: divides the sum instead of what `reduction` says.
        backend: "auto", "cuda", "triton", "cpu" or "reference". The kernels of a GPU take up to 16 learners;
            with more, the reference runs.

    Returns:
        A float32 scalar (float64 for float64 inputs), or (M, ...) of them. If all rows are left out: 0, with
        zero gradients. A class where a peer has mass and a learner's logit is -inf makes that learner's +inf.

    Raises:
        ValueError: shapes or devices that differ, no learner, a temperature that is not positive or requires
            grad, an unknown `pairs` or reduction.
        TypeError: integer logits, labels that are not integers.
        IndexError: a label outside 0..V-1 (on a GPU: NaN in that row, unless KDKERNELS_DEBUG=1).
        BackendError: the backend asked for cannot run here.

    Against others: the authors' code adds up the pairs ("pair_sum"); for two learners that is the paper too. The
    many two-network versions (DML as in torch's `kl_div(..., reduction="batchmean")` both ways) are
    `reduction="batchmean"`.
    """
    checks.flag("scale_by_t2", scale_by_t2)
    logits, one, dim = _peers(logits, dim)
    checks.number("temperature", temperature, low=0, open_low=True, like=one)
    checks.items(num_items, one)
    checks.choice("pairs", pairs, PAIRS)
    checks.choice("reduction", reduction, checks.REDUCTIONS)
    learners = logits.shape[0] if isinstance(logits, torch.Tensor) else len(logits)
    peers = max(learners - 1, 1)
    rows, classes = tuple(one.shape[:dim] + one.shape[dim + 1 :]), one.shape[dim]
    return peer_divergence(
        logits,
        temperature=temperature,
        pair_weight={"paper": 1.0 / peers, "pair_sum": 1.0, "mean": 1.0 / (learners * peers)}[pairs],
        scale_by_t2=scale_by_t2,
        dim=dim,
        reduction=reduction,
        weight=checks.per_row("weight", weight, rows, one.device),
        labels=checks.labels_of(labels, rows, classes, ignore_index, one.device),
        ignore_index=checks.integer("ignore_index", ignore_index),
        num_items=num_items,
        backend=backend,
        operation="mutual_kl_div",
    )


class MutualKLDivLoss(LossModule):
    """`mutual_kl_div` as a module: MutualKLDivLoss(temperature=2.0)([logits_1, logits_2])."""

    function = staticmethod(mutual_kl_div)
