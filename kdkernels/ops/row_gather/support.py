"""What a divergence from a sparse teacher sums over: a row's k classes and, for some treatments, one entry for all others.

Of log-probabilities (..., k): the teacher's entries B and the student's A, (..., k) or (..., k + 1), so that the loss is
sum f(A, B). They are small, so plain PyTorch; the indices ascend in each row, -1 first. `kdkernels.losses.sparse.topk_div`
says what each treatment of the missing mass means.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from kdkernels.ops.row_divergence.kinds import Kind
from kdkernels.ops.row_divergence.reference import log_mixture, xdiff
from kdkernels.ops.row_gather.op import NOTHING, REST, REST_AND_TOTAL


@dataclasses.dataclass(frozen=True)
class Treatment:
    """How the classes that a teacher does not name enter the loss.

    Attributes:
        missing: "renormalize", "renormalize_both", "none", "tail" or "uniform".
        kind: Kind.FORWARD_KL, REVERSE_KL or JSD (in equal shares).
        min_log_prob: of "none": a bound from below.
    """

    missing: str
    kind: Kind
    min_log_prob: float | None = None

    @property
    def outside(self) -> int:
        """What row_gather must find of the student's other classes."""
        if self.missing == "uniform":
            return REST_AND_TOTAL
        return REST if self.missing == "tail" or (self.missing, self.kind) == ("renormalize", Kind.JSD) else NOTHING

    def teacher(self, b: torch.Tensor, indices: torch.Tensor, classes: int, nothing: float) -> torch.Tensor:
        """B from the values b, -inf where there is no index; a mass outside of at most `nothing` is none."""
        valid = indices != -1
        if self.missing.startswith("renormalize"):
            b = _normalised(b, valid)
        elif self.missing == "none":
            b = self._bounded(b, valid)
        if self.outside == NOTHING:
            return b
        if self.missing == "renormalize":
            return torch.cat([b, torch.full_like(b[..., :1], -math.inf)], -1)
        return torch.cat([b, _log_rest(b, _others(indices, classes), nothing).unsqueeze(-1)], -1)

    def student(
        self, a: torch.Tensor, rest: torch.Tensor | None, total: torch.Tensor | None, indices: torch.Tensor, classes: int
    ) -> torch.Tensor:  # fmt: skip
        """A from what row_gather found."""
        valid = indices != -1
        if self.missing == "renormalize_both":
            return _normalised(a, valid)
        if self.missing == "none":
            return self._bounded(a, valid)
        if total is not None:
            # The teacher's mass m, evenly on n classes: sum (m / n) (log(m / n) - a) = m (log m - (log n + mean a)).
            count = _others(indices, classes).clamp(min=1).to(a.dtype)
            rest = count.log() + total / count
        return a if rest is None else torch.cat([a, rest.unsqueeze(-1)], -1)

    def student_gradient(
        self, d: torch.Tensor, a: torch.Tensor, indices: torch.Tensor, classes: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """From the gradient of A those of the three results of row_gather."""
        if self.missing == "renormalize_both":
            return d - _normalised(a, indices != -1).exp() * d.sum(-1, keepdim=True), None, None
        if self.min_log_prob is not None:
            d = d.where(a >= self.min_log_prob, 0.0)
        if self.outside == NOTHING:
            return d, None, None
        d, last = d[..., :-1], d[..., -1]
        if self.outside == REST:
            return d, last, None
        return d, torch.zeros_like(last), last / _others(indices, classes).clamp(min=1)

    def terms(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(f, its derivative by A, by B) of each entry."""
        p, q = a.exp(), b.exp()
        if self.kind == Kind.FORWARD_KL:
            f = xdiff(q, b, a)
            return f, -q, f + q
        if self.kind == Kind.REVERSE_KL:
            f = xdiff(p, a, b)
            return f, f + p, -p
        m = log_mixture(b, a, torch.full((), 0.5, dtype=a.dtype, device=a.device))
        of_a, of_b = 0.5 * xdiff(p, a, m), 0.5 * xdiff(q, b, m)
        return of_a + of_b, of_a, of_b

    def _bounded(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return x if self.min_log_prob is None else x.clamp(min=self.min_log_prob).masked_fill(~valid, -math.inf)


def _normalised(x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """x less its log-sum-exp over the last axis; rows without any valid entry stay as they are."""
    none = ~valid.any(-1, keepdim=True)
    return x - x.masked_fill(none, 0.0).logsumexp(-1, keepdim=True).masked_fill(none, 0.0)


def _others(indices: torch.Tensor, classes: int) -> torch.Tensor:
    """How many classes a row does not name."""
    first = torch.ones_like(indices[..., :1], dtype=torch.bool)
    first = torch.cat([first, indices[..., 1:] != indices[..., :-1]], -1)
    return classes - ((indices != -1) & first).sum(-1)


def _log_rest(b: torch.Tensor, others: torch.Tensor, nothing: float) -> torch.Tensor:
    """log(1 - sum e^b), -inf where that is not above `nothing` or there are no other classes."""
    mass = 1.0 - b.double().exp().sum(-1)
    empty = (mass <= nothing) | (others == 0)
    return mass.masked_fill(empty, 1.0).log().masked_fill(empty, -math.inf).to(b.dtype)
