"""Losses between the similarities of a student's samples to each other and those of a teacher's."""

from __future__ import annotations

from typing import Any

import torch

from kdkernels import backends, checks, groups
from kdkernels.losses.module import LossModule
from kdkernels.ops.gram_match.kinds import Kind, Normalize
from kdkernels.ops.gram_match.op import gram_match

REDUCTIONS = ("mean", "sum")


class _Batch:
    """Both models' samples, (N, D): this process's, or those of all ranks of a group."""

    def __init__(
        self, operation: str, student: torch.Tensor, teacher: torch.Tensor, reduction: str, backend: str,
        group: torch.distributed.ProcessGroup | None, ring: bool,
    ):  # fmt: skip
        checks.choice("reduction", reduction, REDUCTIONS)
        groups.ring(ring, group)
        self.student, self.teacher, self.samples = groups.batch(operation, student, teacher, group, gather=not ring)
        self.n = self.student.shape[0] if self.samples is None else self.samples.whole
        self.scale = 1.0 / max(self.n**2, 1) if reduction == "mean" else 1.0
        self.rows = self.samples if ring else None
        self.backend = backends.resolve(operation, (self.student, self.teacher), backend)

    def match(self, **options: Any) -> torch.Tensor:
        if self.rows is not None:
            from kdkernels.distributed.row_losses import gram_match as of_rows

            return of_rows(self.student, self.teacher, self.rows, **options)
        return gram_match(self.student, self.teacher, **options, backend=self.backend)


def similarity_preserving_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    norm: str = "l2",
    eps: float = 1e-12,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
    ring: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Similarity-preserving distillation: squared differences of the models' row-normalised Gram matrices.

    G = Q Q^T of the flattened features Q (N, D), each of its rows over its length, and sum (G^s - G^t)^2 / N^2: Tung and
    Mori (2019, arXiv:1907.09682).

    Args:
        student: features, float16, bfloat16, float32 or float64, (N, D) or (N, ...).
        teacher: the same N on the same device; dtype and features may differ. Gets a gradient if it requires one.
        norm: the length of a row, "l2" or "l1".
        eps: the least length.
        reduction: "mean" divides by N^2, "sum" by nothing.
        group: the ranks whose samples are one batch, this rank's being `student` and `teacher`, as many as it has; default:
            this process's alone. Values and gradients: kdkernels/distributed/README.md.
        ring: with a group, blocks of samples go from rank to rank and no rank has all of them: memory O(N_local N), each
            rank computes its own rows, by torch's operations whatever the backend.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs); 0 for N = 0.

    Raises:
        ValueError: a different number of samples, differing devices, no features, eps not positive, an unknown norm or
            reduction.
        TypeError: features that are not floating point.
        BackendError: the backend asked for cannot run here.

    Against others: RepDistiller, mdistiller and Zoo code have these defaults. torchdistill passes norm="l1"; its
    reduction="batchmean" is "mean" here, anything else "sum".
    """
    checks.choice("norm", norm, ("l2", "l1"))
    checks.plain_number("eps", eps, low=0, open_low=True)
    batch = _Batch("similarity_preserving_loss", student, teacher, reduction, backend, group, ring)
    return batch.match(kind=Kind.ROWS if norm == "l2" else Kind.ROWS_L1, scale=batch.scale, eps=eps)


def cosine_similarity_matrix_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    eps: float = 1e-12,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
    ring: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Squared differences between the matrices of cosines of all pairs of samples.

    S_ij = cos(z_i, z_j), and sum (S^s - S^t)^2 / N^2: similarity preservation on the unit sphere.

    Args:
        student: features, float16, bfloat16, float32 or float64, (N, D) or (N, ...).
        teacher: the same N on the same device; dtype and features may differ. Gets a gradient if it requires one.
        eps: the least length of a sample. One of zeros has cosine 0 with all and gets no gradient.
        reduction: "mean" divides by N^2, "sum" by nothing.
        group: the ranks whose samples are one batch, this rank's being `student` and `teacher`, as many as it has; default:
            this process's alone. Values and gradients: kdkernels/distributed/README.md.
        ring: with a group, blocks of samples go from rank to rank and no rank has all of them: memory O(N_local N), each
            rank computes its own rows, by torch's operations whatever the backend.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs); 0 for N = 0.

    Raises:
        ValueError: a different number of samples, differing devices, no features, eps not positive, an unknown
            reduction.
        TypeError: features that are not floating point.
        BackendError: the backend asked for cannot run here.
    """
    checks.plain_number("eps", eps, low=0, open_low=True)
    batch = _Batch("cosine_similarity_matrix_loss", student, teacher, reduction, backend, group, ring)
    return batch.match(kind=Kind.LINEAR, normalize=Normalize.CLAMPED, scale=batch.scale, eps=eps)


def correlation_congruence_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    kernel: str = "gaussian",
    gamma: float = 0.4,
    order: int = 2,
    normalize: bool = True,
    distance: str = "squared",
    eps: float = 1e-12,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
    ring: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Correlation congruence: what a kernel makes of all pairs of samples, the same for both models.

    K_ij is one of

    - "gaussian": e^(-2 gamma) sum over p = 0..order of (2 gamma x_i . x_j)^p / p!, the Taylor series of a Gaussian kernel
      on the unit sphere;
    - "bilinear": x_i . x_j;
    - "correlation": Pearson's correlation of x_i and x_j over their features;

    and the loss is sum (K^s_ij - K^t_ij)^2 / N^2: Peng, Jin, Liu, Zhou, Wu, Liu, Zhang and Liu (2019, arXiv:1904.01802).
    kernel="neighbours" is another loss of that name, which compares consecutive samples only:
    sum_i sum_d |s_id - t_id| |s_(i+1)d - t_(i+1)d| / (N - 1).

    Args:
        student: features, float16, bfloat16, float32 or float64, (N, D) or (N, ...).
        teacher: the same N on the same device; dtype and features may differ (not with "neighbours"). Gets a gradient if
            it requires one.
        kernel: "gaussian", "bilinear", "correlation" or "neighbours".
        gamma: of the Gaussian kernel, positive.
        order: the last power of its series.
        normalize: L2-normalise the samples first ("gaussian" and "bilinear"). One of zeros stays so.
        distance: "squared", or "frobenius" for the root of the sum, without a square.
        eps: the least length of a sample.
        reduction: "mean" divides by N^2 ("neighbours": N - 1), "sum" by nothing.
        group: the ranks whose samples are one batch, this rank's being `student` and `teacher`, as many as it has; default:
            this process's alone. Values and gradients: kdkernels/distributed/README.md.
        ring: with a group, blocks of samples go from rank to rank and no rank has all of them: memory O(N_local N), each
            rank computes its own rows, by torch's operations whatever the backend.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs); 0 for N = 0.

    Raises:
        ValueError: a different number of samples, differing devices, no features (or with "neighbours" differing ones),
            gamma or eps not positive, a negative order, an unknown kernel, distance or reduction.
        TypeError: features that are not floating point.
        BackendError: the backend asked for cannot run here.

    Against others: Knowledge-Distillation-Zoo has these defaults. torchdistill passes normalize=False and
    distance="frobenius", with kernel "gaussian" (its max_p is the order) or "bilinear", and its reduction="batchmean" is
    "mean" here, anything else "sum". RepDistiller's Correlation is kernel="neighbours".
    """
    checks.choice("kernel", kernel, ("gaussian", "bilinear", "correlation", "neighbours"))
    checks.choice("distance", distance, ("squared", "frobenius"))
    checks.plain_number("gamma", gamma, low=0, open_low=True)
    checks.plain_number("eps", eps, low=0, open_low=True)
    order = checks.integer("order", order, low=0)
    checks.flag("normalize", normalize)
    if kernel == "neighbours" and ring is True:
        raise ValueError("kernel='neighbours' has no rows for ring=True: leave ring out")
    batch = _Batch("correlation_congruence_loss", student, teacher, reduction, backend, group, ring)
    if kernel == "neighbours":
        return _neighbours(batch.student, batch.teacher, reduction)
    if kernel == "correlation":
        batch.student, batch.teacher, normalize = _centred(batch.student), _centred(batch.teacher), True
    options: dict[str, Any] = {
        "kind": Kind.SERIES if kernel == "gaussian" else Kind.LINEAR,
        "normalize": Normalize.CLAMPED if normalize else Normalize.NONE,
        "order": order,
        "gamma": gamma,
        "eps": eps,
    }
    if distance == "squared":
        return batch.match(**options, scale=batch.scale)
    square = batch.match(**options)
    apart = square > 0
    return batch.scale * square.where(apart, 1.0).sqrt().where(apart, 0.0)


def _centred(x: torch.Tensor) -> torch.Tensor:
    """Samples less the mean of their features, at least in float32; a constant one is exactly 0."""
    x = x if x.dtype == torch.float64 else x.float()
    return (x - x.mean(1, keepdim=True)).where((x != x[:, :1]).any(1, keepdim=True), 0.0)


def _neighbours(student: torch.Tensor, teacher: torch.Tensor, reduction: str) -> torch.Tensor:
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"kernel='neighbours' needs as many features of both models: student has {student.shape[1]} and teacher {teacher.shape[1]}"
        )
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    apart = (student.to(dtype) - teacher.to(dtype)).abs()
    total = (apart[:-1] * apart[1:]).sum()
    return total / max(apart.shape[0] - 1, 1) if reduction == "mean" else total


def pkt_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    eps: float = 1e-7,
    reduction: str = "mean",
    group: torch.distributed.ProcessGroup | None = None,
    ring: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Probabilistic knowledge transfer: KL between the models' distributions over each sample's neighbours.

    With x the features over (length + eps), p_ij = (x_i . x_j + 1) / 2 over its sum along j, and
    sum p^t_ij log((p^t_ij + eps) / (p^s_ij + eps)) / N^2: Passalis and Tefas (2018, arXiv:1803.10837).

    Args:
        student: features, float16, bfloat16, float32 or float64, (N, D) or (N, ...).
        teacher: the same N on the same device; dtype and features may differ. Gets a gradient if it requires one.
        eps: added to lengths and probabilities.
        reduction: "mean" divides by N^2, "sum" by nothing.
        group: the ranks whose samples are one batch, this rank's being `student` and `teacher`, as many as it has; default:
            this process's alone. Values and gradients: kdkernels/distributed/README.md.
        ring: with a group, blocks of samples go from rank to rank and no rank has all of them: memory O(N_local N), each
            rank computes its own rows, by torch's operations whatever the backend.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A float32 scalar (float64 for float64 inputs); 0 for N = 0. A sample of zeros has cosine 0 with all and gets no
        gradient.

    Raises:
        ValueError: a different number of samples, differing devices, no features, eps not positive, an unknown
            reduction.
        TypeError: features that are not floating point.
        BackendError: the backend asked for cannot run here.

    Against others: the authors' code, RepDistiller, torchdistill and mdistiller have these defaults (the last two weigh
    it by 30000); Knowledge-Distillation-Zoo passes eps=1e-6.
    """
    checks.plain_number("eps", eps, low=0, open_low=True)
    batch = _Batch("pkt_loss", student, teacher, reduction, backend, group, ring)
    return batch.match(kind=Kind.PROBABILITIES, normalize=Normalize.SHIFTED, scale=batch.scale, eps=eps)


class SimilarityPreservingLoss(LossModule):
    """`similarity_preserving_loss` as a module: SimilarityPreservingLoss()(student, teacher)."""

    function = staticmethod(similarity_preserving_loss)


class CosineSimilarityMatrixLoss(LossModule):
    """`cosine_similarity_matrix_loss` as a module: CosineSimilarityMatrixLoss()(student, teacher)."""

    function = staticmethod(cosine_similarity_matrix_loss)


class CorrelationCongruenceLoss(LossModule):
    """`correlation_congruence_loss` as a module: CorrelationCongruenceLoss(gamma=0.4)(student, teacher)."""

    function = staticmethod(correlation_congruence_loss)


class PKTLoss(LossModule):
    """`pkt_loss` as a module: PKTLoss(eps=1e-6)(student, teacher)."""

    function = staticmethod(pkt_loss)
