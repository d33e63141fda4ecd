"""Row divergences in plain PyTorch: the oracle of the tests (in float64) and the fallback everywhere.

Every formula is written from its definition; gradients are autograd's, so that the kernels' hand
derivations are checked against something independent. Masking is done before the arithmetic (the
"double where"), since autograd turns a masked infinity into NaN otherwise.
"""

from __future__ import annotations

import math

import torch

from kdkernels.ops.row_divergence.kinds import Inputs, Kind


def xdiff(p: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """p * (x - y), and 0 where p is 0 whatever x and y are."""
    mass = (p != 0) | x.isnan() | y.isnan()  # a NaN is seen wherever it is
    return p * (x.where(mass, 0.0) - y.where(mass, 0.0))


def log_mixture(x: torch.Tensor, y: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """log(share e^x + (1 - share) e^y), 0 where both are -inf; 0 < share < 1."""
    empty = (x == -math.inf) & (y == -math.inf)
    x, y = x.masked_fill(empty, 0.0), y.masked_fill(empty, 0.0)
    return torch.logaddexp(x + torch.log(share), y + torch.log1p(-share))


def _alpha_beta(a: torch.Tensor, b: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    def power(x: torch.Tensor, exponent: float) -> torch.Tensor:
        return torch.ones_like(x) if exponent == 0 else torch.exp(exponent * x)

    both = alpha + beta
    empty = (a == -math.inf) & (b == -math.inf)
    a, b = a.masked_fill(empty, 0.0), b.masked_fill(empty, 0.0)
    if alpha == 0 and beta == 0:
        f = 0.5 * (b - a) ** 2
    elif alpha == 0:
        q, p = power(a, beta), power(b, beta)
        f = (xdiff(q, beta * a, beta * b) - q + p) / beta**2
    elif beta == 0:
        p, q = power(b, alpha), power(a, alpha)
        f = (xdiff(p, alpha * b, alpha * a) - p + q) / alpha**2
    elif both == 0:
        u = alpha * (a - b)
        f = (u + torch.exp(-u) - 1) / alpha**2
    else:
        cross = torch.exp(alpha * b + beta * a)
        f = (power(b, both) * (alpha / both) + power(a, both) * (beta / both) - cross) / (alpha * beta)
    return f.masked_fill(empty, 0.0)


def _decoupled(
    a: torch.Tensor, b: torch.Tensor, label: torch.Tensor, alpha: float | torch.Tensor, beta: float | torch.Tensor
) -> torch.Tensor:
    """alpha KL(label against the rest) + beta KL(among the rest)."""
    if a.shape[-1] == 1:
        return ((a + b) * 0).sum(-1)  # there is no rest
    index = label.unsqueeze(-1)
    rest_a, rest_b = a.scatter(-1, index, -math.inf), b.scatter(-1, index, -math.inf)
    no_a, no_b = rest_a.logsumexp(-1), rest_b.logsumexp(-1)
    yes_a, yes_b = a.gather(-1, index).squeeze(-1), b.gather(-1, index).squeeze(-1)
    binary = xdiff(yes_b.exp(), yes_b, yes_a) + xdiff(no_b.exp(), no_b, no_a)
    rest_b = rest_b - no_b.unsqueeze(-1)
    rest = xdiff(rest_b.exp(), rest_b, rest_a - no_a.unsqueeze(-1)).sum(-1)
    return alpha * binary + beta * rest


def divergence(
    kind: Kind, a: torch.Tensor, b: torch.Tensor, p0: float | torch.Tensor, p1: float | torch.Tensor
) -> torch.Tensor:
    """The divergence of each row: a and b are log-probabilities (..., V) of student and teacher."""
    ps, pt = a.exp(), b.exp()
    # Filled there: a number that is copied to a GPU makes the host wait for it.
    share = p0.to(a) if isinstance(p0, torch.Tensor) else torch.full((), p0, dtype=a.dtype, device=a.device)
    value = float(p0)  # the reference may look at values; only kernels must not
    if kind == Kind.JSD and value in (0.0, 1.0):
        kind = Kind.FORWARD_KL if value == 0 else Kind.REVERSE_KL
    if kind == Kind.FORWARD_KL:
        f = xdiff(pt, b, a)
    elif kind == Kind.REVERSE_KL:
        f = xdiff(ps, a, b)
    elif kind == Kind.JSD:
        m = log_mixture(b, a, share)
        f = share * xdiff(pt, b, m) + (1 - share) * xdiff(ps, a, m)
    elif kind == Kind.SKEW_KL:
        f = xdiff(pt, b, a if value == 0 else b if value == 1 else log_mixture(b, a, share))
    elif kind == Kind.SKEW_REVERSE_KL:
        f = xdiff(ps, a, b if value == 0 else a if value == 1 else log_mixture(a, b, share))
    elif kind == Kind.TOTAL_VARIATION:
        f = 0.5 * (ps - pt).abs()
    elif kind == Kind.ALPHA_BETA:
        f = _alpha_beta(a, b, value, float(p1))
    elif kind == Kind.SOFT_CROSS_ENTROPY:
        f = xdiff(pt, torch.zeros_like(a), a if value == 0 else torch.log((ps + p1) / (1 + p0)))
    else:
        f = torch.zeros_like(a)
        if value != 0:
            f = f + share * xdiff(pt, b, a)
        if value != 1:
            f = f + (1 - share) * xdiff(ps, a, b)
    return f.sum(-1)


def row_divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    kind: Kind,
    temperature: float | torch.Tensor,
    teacher_temperature: float | torch.Tensor | None,
    kd_weight: float | torch.Tensor,
    ce_weight: float | torch.Tensor | None,
    scale_by_t2: bool,
    dim: int,
    reduction: str,
    labels: torch.Tensor | None,
    weight: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    num_items: float | torch.Tensor | None,
    inputs: Inputs,
    p0: float | torch.Tensor,
    p1: float | torch.Tensor,
) -> torch.Tensor:
    """The same operation as op.row_divergence, whose docstring says what each argument is."""
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    s, t = student.movedim(dim, -1).to(dtype), teacher.movedim(dim, -1).to(dtype)
    rows = s.shape[:-1]
    w = torch.ones(rows, dtype=dtype, device=s.device) if weight is None else weight.to(dtype)
    if labels is not None:
        w = w.masked_fill(labels == ignore_index, 0.0)
    kept = w != 0
    s, t = s.where(kept.unsqueeze(-1), 0.0), t.where(kept.unsqueeze(-1), 0.0)

    if inputs == Inputs.LOGITS:
        a = torch.log_softmax(s / temperature, -1)
        b = torch.log_softmax(t / (temperature if teacher_temperature is None else teacher_temperature), -1)
    else:
        a, b = s, t.log() if inputs == Inputs.LOG_PROBS_AND_PROBS else t
    scale = kd_weight * temperature**2 if scale_by_t2 else kd_weight
    if kind == Kind.DECOUPLED_KL:
        assert labels is not None
        rows_kd = _decoupled(a, b, labels.where(kept, 0), p0, p1)
    else:
        rows_kd = divergence(kind, a, b, p0, p1)
    kd = (w * rows_kd).where(kept, 0.0) * scale

    ce = torch.zeros_like(kd)
    ce_mass = w
    if ce_weight is not None:
        assert labels is not None
        target = labels.where(kept, 0)
        cw = torch.ones(s.shape[-1], dtype=dtype, device=s.device) if class_weight is None else class_weight.to(dtype)
        log_p = torch.log_softmax(s, -1)
        own = -cw[target] * log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        ce = (1 - label_smoothing) * own
        if label_smoothing != 0:
            ce = ce - label_smoothing / s.shape[-1] * (cw * log_p).sum(-1)
        ce = (w * ce).where(kept, 0.0) * ce_weight
        ce_mass = w * cw[target]

    if reduction == "none":
        return kd + ce
    per_row = {"sum": 1.0, "batchmean": float(student.shape[0])}.get(reduction) if num_items is None else num_items
    kd_divisor = per_row if per_row is not None else w.sum() if reduction == "rowmean" else float(s.numel())
    ce_divisor = per_row if per_row is not None else ce_mass.sum()
    return _divide(kd.sum(), kd_divisor) + _divide(ce.sum(), ce_divisor)


def _divide(total: torch.Tensor, divisor: float | torch.Tensor) -> torch.Tensor:
    """total / divisor, and 0 where nothing was counted."""
    divisor = torch.as_tensor(divisor, dtype=total.dtype, device=total.device).reshape(())
    empty = divisor == 0
    return total.where(~empty, 0.0) / divisor.where(~empty, 1.0)
