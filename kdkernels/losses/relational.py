"""Losses between the relations of a student's samples to each other and those of a teacher's."""

from __future__ import annotations

import torch

from kdkernels import backends, checks, groups
from kdkernels.losses.module import LossModule
from kdkernels.losses.samples import EPS, normalized, squared_distances
from kdkernels.ops.pairwise_distance import op as pairwise
from kdkernels.ops.pairwise_distance import reference as pairwise_reference
from kdkernels.ops.scalars import Number, factor
from kdkernels.ops.triplet_angle import op as angles
from kdkernels.ops.triplet_angle import reference as angles_reference


def _pairs(
    rows: int, n: int, mask: torch.Tensor | None, labels: torch.Tensor | None, others: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor | None:  # fmt: skip
    """A weight for every ordered pair of a row and one of n samples, float32 or float64, or None for all 1.

    `others` are the labels of the n samples, `labels` those of the rows.
    """
    if mask is not None:
        if not isinstance(mask, torch.Tensor):
            raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
        if tuple(mask.shape) != (rows, n):
            raise ValueError(f"mask must have one value a pair, shape ({rows}, {n}); got {tuple(mask.shape)}")
        if mask.device != device:
            raise ValueError(f"mask must be on {device} with the embeddings, got {mask.device}")
        if mask.requires_grad:
            raise ValueError("mask gets no gradient here: pass mask.detach()")
        mask = mask if mask.dtype == torch.float64 else mask.float()
    if labels is not None:
        if not isinstance(labels, torch.Tensor):
            raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
        if tuple(labels.shape) != (rows,):
            raise ValueError(f"labels must have one class a sample, shape ({rows},); got {tuple(labels.shape)}")
        if labels.device != device:
            raise ValueError(f"labels must be on {device} with the embeddings, got {labels.device}")
        same = labels[:, None] == (labels if others is None else others)[None]
        mask = same.float() if mask is None else mask * same
    return mask


class _Distances:
    """Both models' squared distances, made once for all the terms that want them: of all samples, or with `ring` this rank's
    rows of them."""

    def __init__(
        self, operation: str, student: torch.Tensor, teacher: torch.Tensor, normalize: bool, backend: str,
        group: torch.distributed.ProcessGroup | None, ring: bool = False, **pairs: torch.Tensor | None,
    ):  # fmt: skip
        groups.ring(ring, group)
        checks.flag("normalize", normalize)
        self.student, self.teacher, self.samples = groups.batch(
            operation, student, teacher, group, gather=not ring, **pairs
        )
        self.backend = backends.resolve(operation, (self.student, self.teacher), backend)
        self.rows = self.samples if ring else None
        self.n = self.student.shape[0] if self.samples is None else self.samples.whole
        if normalize:
            self.student, self.teacher = normalized(self.student), normalized(self.teacher)
        if self.reference:
            dtype = torch.promote_types(torch.promote_types(self.student.dtype, self.teacher.dtype), torch.float32)
            self.student, self.teacher = self.student.to(dtype), self.teacher.to(dtype)

    @property
    def reference(self) -> bool:
        return self.backend == "reference"

    def squared(self, *, exact: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Of both models; `exact` ones as samples.py has them."""
        if self.rows is not None:
            from kdkernels.distributed import ring

            return ring.squared_distances(self.student, self.rows), ring.squared_distances(self.teacher, self.rows)
        student, teacher = (squared_distances(x, self.backend, exact=exact) for x in (self.student, self.teacher))
        return student, teacher

    def pairs(self, mask: torch.Tensor | None, labels: torch.Tensor | None) -> torch.Tensor | None:
        """The weights of the pairs that squared() has."""
        others = None
        if self.samples is not None:
            if labels is not None:
                others = self.samples.gather(labels)
                labels = others if self.rows is None else labels
            if mask is not None and self.rows is None:
                mask = self.samples.gather(mask)
        return _pairs(self.student.shape[0], self.n, mask, labels, others, self.student.device)

    def itself(self) -> torch.Tensor:
        """Where squared() has a sample's distance from itself."""
        if self.rows is not None:
            from kdkernels.distributed.ring import others

            return ~others(self.rows, self.student.device)
        return torch.eye(self.n, dtype=torch.bool, device=self.student.device)

    def match(
        self, mask: torch.Tensor | None, distance: angles.Distances | None, angle: angles.Angles | None,
        weights: tuple[Number, Number] = (1.0, 1.0),
    ) -> torch.Tensor:  # fmt: skip
        """The term asked for, or the weighted sum of both."""
        if self.rows is None and not self.reference:
            mask = None if mask is None else mask.detach().float().contiguous()
            return angles.relations(
                self.student, self.teacher, mask, distance=distance, angle=angle, weights=weights, backend=self.backend
            )
        made = []
        if distance is not None and self.rows is not None:
            from kdkernels.distributed.row_losses import distance_match

            made.append(distance_match(*self.squared(), mask, self.rows, **distance._asdict()))
        elif distance is not None:
            made.append(pairwise_reference.distance_match(*self.squared(), mask, **distance._asdict()))
        if angle is not None:
            made.append(angles_reference.triplet_angle(self.student, self.teacher, **angle._asdict()))
        return made[0] if len(made) == 1 else weights[0] * made[0] + weights[1] * made[1]


def rkd_distance_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    squared: bool = False,
    normalize: bool = False,
    mean_normalize: bool = True,
    mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    beta: float = 1.0,
    eps: float = EPS,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
    ring: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Distance-wise relational distillation: smooth-L1 between all pairwise distances of both models.

    d_ij = |x_i - x_j|, each model's divided by its own mean over the pairs whose d is positive, and the mean over all
    N^2 pairs (the diagonal's zeros count) of smooth_l1(d^s_ij - d^t_ij): Park, Kim, Lu and Cho (2019,
    arXiv:1904.05068). The mean distance is in the graph.

    Args:
        student: embeddings, float16, bfloat16, float32 or float64, (N, D) or (N, ...).
        teacher: the same N on the same device; dtype and features may differ. Gets a gradient if it requires one.
        squared: match squared distances.
        normalize: L2-normalise the embeddings first.
        mean_normalize: divide by the mean distance.
        mask: a weight (or boolean) for every ordered pair, (N, N); it weighs the mean distance too. With a group, rows of
            this rank's samples and a column for everybody's.
        labels: classes of the samples, (N,): only pairs of one class are kept, as with a mask. With a group, this rank's.
        beta: where smooth-L1 turns linear, a positive number.
        eps: the least squared distance of two different samples, below which they get no gradient.
        reduction: "mean" divides by N^2, "pairs" by the sum of the kept pairs' weights (the diagonal never counts),
            "sum" by nothing.
        group: the ranks whose samples are one batch, this rank's being `student` and `teacher`, as many as it has; default:
            this process's alone. Values and gradients: kdkernels/distributed/README.md.
        ring: with a group, blocks of samples go from rank to rank and no rank has all of them: memory O(N_local N), each
            rank computes its own rows, by torch's operations whatever the backend.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs): 0 for N < 2, or where no pair is kept.

    Raises:
        ValueError: a different number of samples, differing devices, no features, a mask or labels of another shape,
            beta not positive, eps negative, an unknown reduction.
        TypeError: embeddings that are not floating point.
        BackendError: the backend asked for cannot run here.

    Against others: the authors' code, torchdistill, RepDistiller and mdistiller have these defaults (weighted by 1 in the
    first two and 25 in the others); mmrazor passes normalize=True (and 25).
    """
    checks.plain_number("beta", beta, low=0, open_low=True)
    checks.plain_number("eps", eps, low=0)
    checks.choice("reduction", reduction, pairwise.REDUCTIONS)
    distances = _Distances(
        "rkd_distance_loss", student, teacher, normalize, backend, group, ring, mask=mask, labels=labels
    )
    checks.flag("squared", squared)
    checks.flag("mean_normalize", mean_normalize)
    term = angles.Distances(beta, eps, squared, mean_normalize, reduction)
    return distances.match(distances.pairs(mask, labels), term, None)


def rkd_angle_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    normalize: bool = False,
    beta: float = 1.0,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Angle-wise relational distillation: smooth-L1 between the cosines of the angles of all triplets.

    cos_ijk is the cosine of the angle at x_i between x_j and x_k, and 0 where x_i coincides with either; the mean
    over all N^3 triplets of smooth_l1(cos^s_ijk - cos^t_ijk), those with i = j, i = k or j = k included: Park, Kim, Lu
    and Cho (2019, arXiv:1904.05068). Memory is O(N^2).

    Args:
        student: embeddings, float16, bfloat16, float32 or float64, (N, D) or (N, ...).
        teacher: the same N on the same device; dtype and features may differ. Gets a gradient if it requires one.
        normalize: L2-normalise the embeddings first.
        beta: where smooth-L1 turns linear, a positive number.
        reduction: "mean" divides by N^3, "sum" by nothing.
        group: the ranks whose samples are one batch, this rank's being `student` and `teacher`, as many as it has; default:
            this process's alone. Values and gradients: kdkernels/distributed/README.md.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs): 0 for N < 2. Samples that coincide get no gradient from each
        other (published code: theirs divided by 1e-12).

    Raises:
        ValueError: a different number of samples, differing devices, no features, beta not positive, an unknown
            reduction.
        TypeError: embeddings that are not floating point.
        BackendError: the backend asked for cannot run here.

    Against others: the authors' code, torchdistill, RepDistiller and mdistiller have these defaults (weighted by 2 in the
    first two and 50 in the others); mmrazor passes normalize=True (and 50).
    """
    checks.plain_number("beta", beta, low=0, open_low=True)
    checks.choice("reduction", reduction, angles.REDUCTIONS)
    distances = _Distances("rkd_angle_loss", student, teacher, normalize, backend, group)
    return distances.match(None, None, angles.Angles(beta, reduction))


def rkd_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    distance_weight: Number = 1.0,
    angle_weight: Number = 2.0,
    squared: bool = False,
    normalize: bool = False,
    mean_normalize: bool = True,
    mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    beta: float = 1.0,
    eps: float = EPS,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Relational distillation: rkd_distance_loss and rkd_angle_loss, from distances made once.

    Park, Kim, Lu and Cho (2019, arXiv:1904.05068).

    Args:
        student, teacher: embeddings, as in rkd_distance_loss.
        distance_weight, angle_weight: the terms' weights, numbers or tensors with one element.
        squared, mean_normalize, mask, labels, eps: of the distance term, as in rkd_distance_loss.
        normalize: L2-normalise the embeddings first, for both terms.
        beta: where smooth-L1 turns linear, in both terms.
        reduction: "mean" divides by N^2 and N^3, "sum" by nothing.
        group: the ranks whose samples are one batch, this rank's being `student` and `teacher`, as many as it has; default:
            this process's alone. Values and gradients: kdkernels/distributed/README.md.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, BackendError: as rkd_distance_loss and rkd_angle_loss.

    Against others: weights 1 and 2 in the authors' code and torchdistill; 25 and 50 in RepDistiller, mdistiller and
    mmrazor (the last with normalize=True).
    """
    checks.number("distance_weight", distance_weight, like=student)
    checks.number("angle_weight", angle_weight, like=student)
    checks.plain_number("beta", beta, low=0, open_low=True)
    checks.plain_number("eps", eps, low=0)
    checks.choice("reduction", reduction, angles.REDUCTIONS)
    distances = _Distances("rkd_loss", student, teacher, normalize, backend, group, mask=mask, labels=labels)
    checks.flag("squared", squared)
    checks.flag("mean_normalize", mean_normalize)
    term = angles.Distances(beta, eps, squared, mean_normalize, reduction)
    weights = factor(distance_weight), factor(angle_weight)
    return distances.match(distances.pairs(mask, labels), term, angles.Angles(beta, reduction), weights)


def hard_dark_rank_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    alpha: Number = 3.0,
    beta: Number = 3.0,
    k: int = 4,
    normalize: bool = False,
    eps: float = EPS,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
    ring: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Hard Dark Rank: the likelihood, under the student's distances, of the teacher's order of each sample's neighbours.

    Scores are s_ij = -alpha d_ij^beta. For each sample, the teacher's k nearest others in order are pi_1 .. pi_k, and the
    loss is the negative log-likelihood of that order in the Plackett-Luce model of the student's scores, whose
    denominators run over the k chosen only: -sum_m [s_(pi_m) - log sum_(l >= m) exp s_(pi_l)]. Chen, Wang and Zhang
    (2018, arXiv:1707.01220), as the authors of RKD run it.

    Args:
        student: embeddings, float16, bfloat16, float32 or float64, (N, D) or (N, ...).
        teacher: the same N on the same device; dtype and features may differ. Gets no gradient: only its order counts.
        alpha, beta: of the scores, positive; numbers or tensors with one element.
        k: how many neighbours are ranked; all others where there are fewer.
        normalize: L2-normalise the embeddings first.
        eps: the least squared distance of two different samples, below which they get no gradient.
        reduction: "mean" over the samples, "sum", or "none" for one value a sample (with a group, of this rank's).
        group: the ranks whose samples are one batch, this rank's being `student` and `teacher`, as many as it has; default:
            this process's alone. Values and gradients: kdkernels/distributed/README.md.
        ring: with a group, blocks of samples go from rank to rank and no rank has all of them: memory O(N_local N), each
            rank computes its own rows, by torch's operations whatever the backend.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs), or (N,); 0 for N < 2.

    Raises:
        ValueError: a different number of samples, differing devices, no features, alpha, beta or k not positive, an
            unknown reduction.
        TypeError: embeddings that are not floating point.
        BackendError: the backend asked for cannot run here.

    Against others: the authors of RKD use alpha = 3 in the module and 2 in their training script, beta = 3, k = 4.
    """
    checks.number("alpha", alpha, low=0, open_low=True, like=student)
    checks.number("beta", beta, low=0, open_low=True, like=student)
    checks.plain_number("eps", eps, low=0)
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    checks.integer("k", k, low=1)
    checks.float_tensor("teacher", teacher)
    distances = _Distances("hard_dark_rank_loss", student, teacher.detach(), normalize, backend, group, ring)
    n, samples = distances.n, distances.samples
    # To a power, times a factor, in an exponent: what float32 would round there is after the point of the result.
    d2, by_teacher = distances.squared(exact=True)
    by_teacher = by_teacher.masked_fill(distances.itself(), torch.nan)  # which comes after all numbers
    order, nearest = by_teacher.topk(min(k, max(n - 1, 0)), dim=1, largest=False)
    chosen = d2.gather(1, nearest).double()
    apart = ~(chosen <= eps)  # so is NaN
    scores = -alpha * torch.where(apart, chosen.where(apart, 1.0) ** (beta / 2), eps ** (beta / 2))
    # The m-th denominator runs over the m-th to the k-th of the order.
    denominators = scores.flip(1).logcumsumexp(1)
    rows = (denominators.sum(1) - scores.sum(1)).to(torch.promote_types(student.dtype, torch.float32))
    rows = rows.masked_fill(order.isnan().any(1), torch.nan)  # nobody knows in what order
    if reduction == "none":
        return rows if samples is None or ring else rows[samples.own]
    total = samples.total(rows.sum()) if samples is not None and ring else rows.sum()
    return total if reduction == "sum" else total / max(n, 1)


class RKDDistanceLoss(LossModule):
    """`rkd_distance_loss` as a module: RKDDistanceLoss()(student, teacher)."""

    function = staticmethod(rkd_distance_loss)


class RKDAngleLoss(LossModule):
    """`rkd_angle_loss` as a module: RKDAngleLoss()(student, teacher)."""

    function = staticmethod(rkd_angle_loss)


class RKDLoss(LossModule):
    """`rkd_loss` as a module: RKDLoss(distance_weight=25, angle_weight=50)(student, teacher)."""

    function = staticmethod(rkd_loss)


class HardDarkRankLoss(LossModule):
    """`hard_dark_rank_loss` as a module: HardDarkRankLoss(alpha=2.0)(student, teacher)."""

    function = staticmethod(hard_dark_rank_loss)
