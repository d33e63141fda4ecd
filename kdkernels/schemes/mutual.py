"""Models that learn together: deep mutual learning, and peers or a teacher of other capacities in one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kdkernels import checks
from kdkernels.losses.logits import kl_div
from kdkernels.losses.mutual import mutual_kl_div
from kdkernels.schemes.gradients import scale_gradient
from kdkernels.schemes.labels import cross_entropy, known_labels


def _learners(logits: Sequence[torch.Tensor] | torch.Tensor) -> list[torch.Tensor]:
    if isinstance(logits, torch.Tensor) and logits.dim() < 2:
        raise ValueError(f"logits must be (learners, ..., classes), got shape {tuple(logits.shape)}")
    learners = list(logits) if isinstance(logits, torch.Tensor) else checks.tensors("logits", logits)
    if not learners:
        raise ValueError("logits must hold at least one learner, got none")
    return learners


def mutual_learning_loss(
    logits: Sequence[torch.Tensor] | torch.Tensor,
    labels: torch.Tensor,
    *,
    weight: float = 1.0,
    ignore_index: int = -100,
    **options: Any,
) -> torch.Tensor:
    """Deep mutual learning, the whole loss: every model's cross-entropy and its divergence from its peers.

        loss = mutual_learning_loss([model(x) for model in models], y)
        loss.backward()           # then one optimizer over all, or one for each

    sum_i CE(z_i, y) + weight * mutual_kl_div(z): Zhang et al. (2018, arXiv:1706.00384), weight 1 and temperature 1.
    A model gets no gradient through the terms in which it teaches, so that one backward trains all; the paper
    updates the models in turn, each seeing the others' newest weights, which is this loss called once a model.

    Args:
        logits: scores of M models, a list of (..., V) or one (M, ..., V).
        labels: class indices, (...).
        weight: of the mutual term.
        ignore_index: rows with this label are left out of both terms.
        options: keyword arguments of `mutual_kl_div` (temperature, pairs, backend, ...).

    Raises:
        ValueError, TypeError, IndexError, BackendError: as mutual_kl_div.
    """
    checks.plain_number("weight", weight)
    learners = _learners(logits)
    alone = torch.stack([cross_entropy(z, labels, ignore_index) for z in learners]).sum()
    return alone + weight * mutual_kl_div(logits, labels=labels, ignore_index=ignore_index, **options)


def collaborative_loss(
    logits: Sequence[torch.Tensor] | torch.Tensor,
    labels: torch.Tensor,
    *,
    influence: Sequence[Sequence[float]],
    teaching_gradient: float = 0.0,
    label_weights: Sequence[float] | None = None,
    ignore_index: int = -100,
    **options: Any,
) -> torch.Tensor:
    """Models of different capacities in one run, with a say in who learns from whom and how much.

    sum_i label_weights[i] CE(z_i, y) + sum_ij influence[i][j] KL(p_j, p_i): every ordered pair of weight 0 costs
    nothing. A strong model keeps its quality with small weights in its row, e.g. for (large, small)
    influence=[[0, 0], [1, 0]] is online distillation (the large model never listens to the small one) and
    [[0, 0.1], [1, 0]] lets it listen a little. `teaching_gradient` is the share of the gradient that reaches whoever
    teaches: 0 stops it; above 0, the teacher moves towards what its student can follow, and at 1 it does so fully.
    After Anil et al., codistillation (2018, arXiv:1804.03235), and Guo et al., KDCL (2020, CVPR).

    Args:
        logits: scores of M models over the same classes, a list of (..., V) or one (M, ..., V).
        labels: class indices, (...).
        influence: M rows of M weights, at least 0; the diagonal is not read.
        teaching_gradient: between 0 and 1.
        label_weights: M weights of the cross-entropies; default: ones.
        ignore_index: rows with this label are left out of all terms.
        options: keyword arguments of `kl_div` (temperature, backend, ...).

    Raises:
        ValueError: `influence` or `label_weights` of another size, a negative weight; as kl_div.
        TypeError, IndexError, BackendError: as kl_div.
    """
    learners = _learners(logits)
    count = len(learners)
    if not isinstance(influence, (list, tuple)) or not all(isinstance(row, (list, tuple)) for row in influence):
        raise TypeError(f"influence must be rows of weights, got {type(influence).__name__}")
    if len(influence) != count or any(len(row) != count for row in influence):
        raise ValueError(f"influence must be {count} rows of {count} weights, one for every ordered pair of models")
    label_weights = [1.0] * count if label_weights is None else label_weights
    if not isinstance(label_weights, (list, tuple)):
        raise TypeError(f"label_weights must be a sequence of numbers, got {type(label_weights).__name__}")
    for i, w in enumerate(label_weights):
        checks.plain_number(f"label_weights[{i}]", w)
    if len(label_weights) != count:
        raise ValueError(f"label_weights must have {count} weights, got {len(label_weights)}")
    checks.plain_number("teaching_gradient", teaching_gradient, low=0, high=1)
    terms = [w * cross_entropy(z, labels, ignore_index) for w, z in zip(label_weights, learners, strict=True)]
    loss = torch.stack(terms).sum()
    options |= {"labels": labels, "ignore_index": ignore_index}
    teachers = [scale_gradient(z, teaching_gradient) for z in learners]
    for i, row in enumerate(influence):
        for j, weight in enumerate(row):
            checks.plain_number(f"influence[{i}][{j}]", weight, low=0)
            if i != j and weight > 0:
                loss = loss + weight * kl_div(learners[i], teachers[j], **options)
    return loss


def ensemble_logits(
    logits: Sequence[torch.Tensor] | torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    how: str = "mean",
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """One teacher made of all models of a run, without a gradient to them.

    Args:
        logits: scores of M models, a list of (..., V) or one (M, ..., V).
        labels: class indices, (...), for "best".
        how: "mean": the average of the logits; "best": on every row the model with the lowest cross-entropy (KDCL's
            naive ensemble, Guo et al. 2020, by row); "gate": the sum weighted by `gate`.
        gate: (..., M) weights, e.g. the softmax of a gating layer (ONE, Lan et al. 2018, arXiv:1806.04606), which
            does get a gradient.

    Raises:
        ValueError: an unknown `how`, or what it needs is missing or of another shape.
        TypeError, IndexError: labels that are no class indices.
    """
    checks.choice("how", how, ("mean", "best", "gate"))
    if gate is not None:
        checks.float_tensor("gate", gate)
    stacked = torch.stack([z.detach() for z in _learners(logits)])
    if gate is not None:
        checks.same_device(logits=stacked, gate=gate)
    if how == "mean":
        return stacked.mean(0)
    if how == "gate":
        if gate is None or gate.shape != (*stacked.shape[1:-1], len(stacked)):
            raise ValueError(f"gate must have shape {(*stacked.shape[1:-1], len(stacked))} for how='gate'")
        return (gate.movedim(-1, 0).unsqueeze(-1) * stacked).sum(0)
    if labels is None:
        raise ValueError("labels must be given for how='best'")
    labels = known_labels(labels, stacked[0])
    index = labels.expand(len(stacked), *labels.shape).unsqueeze(-1)
    best = stacked.log_softmax(-1).gather(-1, index).argmax(0, keepdim=True)
    return stacked.gather(0, best.expand(1, *stacked.shape[1:])).squeeze(0)
