"""torchdistill's mid-level losses, by our kernels: one call, and a YAML that names them runs with ours.

    from kdkernels.integrations import torchdistill
    torchdistill.register()

Names, constructor arguments (the `kwargs` of the YAML), values and gradients are torchdistill 1.1's. What is deliberately
not as there:

* A loss of half-precision tensors is float32.
* KDLoss over logits (N, V) with integer targets is one pass, which leaves a row whose target is -100 out of both terms (there:
  of the cross-entropy only). With `ignore_index` or other shapes it is torchdistill's, in two passes.
* A reduction must be one that makes a scalar.
* Coincident samples, zero vectors and models that agree get a gradient of 0 where theirs divides by 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

import kdkernels
from kdkernels import checks
from kdkernels.integrations.repdistiller import ContrastMemory

__all__ = [
    "ATLoss",
    "CCKDLoss",
    "CRDLoss",
    "ChSimLoss",
    "DISTLoss",
    "FSPLoss",
    "HierarchicalContextLoss",
    "KDLoss",
    "LogitStdKDLoss",
    "PKTLoss",
    "RKDLoss",
    "SPKDLoss",
    "VIDLoss",
    "register",
]

IO = Mapping[str, Mapping[str, Any]]  # what modules took and gave: by path, then "input" or "output"
Pairs = Mapping[str, Mapping[str, Any]]


def register(names: Iterable[str] | None = None) -> None:
    """Puts our losses in the places of torchdistill's in its registry.

    Args:
        names: which; default: all of this module.

    Raises:
        ImportError: torchdistill is not installed.
        ValueError: a name of which there is no loss here.
    """
    names = tuple(LOSSES if names is None else names)
    for name in names:
        checks.choice("loss", name, tuple(LOSSES))
    try:
        # All of its losses, so that theirs are registered before ours and not after.
        from torchdistill.losses import mid_level  # noqa: F401
        from torchdistill.losses.registry import register_mid_level_loss
    except ImportError as error:
        raise ImportError(f"register needs torchdistill: pip install torchdistill torchvision ({error})") from error
    for name in names:
        register_mid_level_loss(LOSSES[name], key=name)


class _OfModules(nn.Module):
    """A loss of what one module of the student and one of the teacher took or gave: their `of`."""

    of: Callable[..., torch.Tensor]

    def __init__(
        self, student_module_path: str, student_module_io: str, teacher_module_path: str, teacher_module_io: str
    ):
        super().__init__()
        self.student_module_path, self.student_module_io = student_module_path, student_module_io
        self.teacher_module_path, self.teacher_module_io = teacher_module_path, teacher_module_io

    def both(self, student_io_dict: IO, teacher_io_dict: IO) -> tuple[Any, Any]:
        return (
            student_io_dict[self.student_module_path][self.student_module_io],
            teacher_io_dict[self.teacher_module_path][self.teacher_module_io],
        )

    def forward(self, student_io_dict: IO, teacher_io_dict: IO, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.of(*self.both(student_io_dict, teacher_io_dict))


class _OfOutputs(_OfModules):
    """A loss of what one module of the student and one of the teacher gave."""

    def __init__(self, student_path: str, teacher_path: str):
        super().__init__(student_path, "output", teacher_path, "output")


class _OfPairs(nn.Module):
    """A weighted sum over pairs of a student's and a teacher's maps: the `of` of those that the YAML names."""

    of: Callable[..., torch.Tensor]

    def __init__(self, pairs: Pairs):
        super().__init__()
        self.pairs = pairs

    def forward(self, student_io_dict: IO, teacher_io_dict: IO, *args: Any, **kwargs: Any) -> torch.Tensor:
        terms = []
        for pair in self.pairs.values():
            chosen = {
                name: (student_io_dict if name.startswith("student") else teacher_io_dict)[config["path"]][config["io"]]
                for name, config in pair.items()
                if isinstance(config, Mapping)
            }
            terms.append(pair.get("weight", 1) * self.of(**chosen))
        return torch.stack(terms).sum()


class KDLoss(_OfModules):
    """alpha CE + beta T^2 KL(p_t, p_s); without alpha or targets the KL alone, with neither weight nor T^2.

    Args:
        student_module_path, student_module_io, teacher_module_path, teacher_module_io: where the logits are.
        temperature: T.
        alpha: the cross-entropy's weight.
        beta: the KL's; default: 1 - alpha.
        reduction: "batchmean", "mean" or "sum" of the KL; the cross-entropy's is "mean" for the first.
        kwargs: of torch.nn.CrossEntropyLoss.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        **kwargs: Any,
    ):
        super().__init__(student_module_path, student_module_io, teacher_module_path, teacher_module_io)
        checks.choice("reduction", reduction, ("batchmean", "mean", "sum"))
        self.temperature, self.alpha, self.reduction = temperature, alpha, reduction
        self.beta = beta if beta is not None else 1 - (alpha or 0.0)
        self.ignores = "ignore_index" in kwargs
        hard_reduction = "mean" if reduction == "batchmean" else reduction
        self.cross_entropy_loss = nn.CrossEntropyLoss(reduction=hard_reduction, **kwargs)

    def soft(self, student: torch.Tensor, teacher: torch.Tensor, **options: Any) -> torch.Tensor:
        return kdkernels.kl_div(
            student, teacher, temperature=self.temperature, dim=1, reduction=self.reduction, **options
        )

    def forward(
        self, student_io_dict: IO, teacher_io_dict: IO, targets: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        student, teacher = self.both(student_io_dict, teacher_io_dict)
        if not self.alpha or targets is None:
            return self.soft(student, teacher, scale_by_t2=False)
        beta = self.beta
        if self.ignores or student.dim() != 2 or targets.dim() != 1 or self.alpha < 0 or beta < 0:
            return self.alpha * self.cross_entropy_loss(student, targets) + beta * self.soft(student, teacher)
        total = self.alpha + beta
        return total * kdkernels.distillation_loss(
            student, teacher, targets, self.temperature, beta / total, reduction=self.reduction.replace("batch", "row"),
            class_weight=self.cross_entropy_loss.weight, label_smoothing=self.cross_entropy_loss.label_smoothing,
        )  # fmt: skip


class LogitStdKDLoss(KDLoss):
    """KDLoss whose KL is of logits less their mean, over their standard deviation + eps; its cross-entropy is not.

    Args:
        eps: added to each row's standard deviation.

    The other arguments are KDLoss's.
    """

    def __init__(self, *args: Any, eps: float = 1e-7, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.eps = eps

    def _standardized(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / (self.eps + x.std(-1, keepdim=True))

    def forward(
        self, student_io_dict: IO, teacher_io_dict: IO, targets: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        student, teacher = self.both(student_io_dict, teacher_io_dict)
        student_z, teacher_z = self._standardized(student), self._standardized(teacher)
        if not self.alpha or targets is None:
            return self.soft(student_z, teacher_z, scale_by_t2=False)
        return self.alpha * self.cross_entropy_loss(student, targets) + self.beta * self.soft(student_z, teacher_z)


class FSPLoss(_OfPairs):
    """Flow of solution procedure: maximum pooling, unsquared lengths.

    Args:
        fsp_pairs: by name {student_first, student_second, teacher_first, teacher_second: {io, path}, weight}.
    """

    def __init__(self, fsp_pairs: Pairs, **kwargs: Any):
        super().__init__(fsp_pairs)

    def of(self, **maps: Any) -> torch.Tensor:
        return kdkernels.fsp_loss(**maps, pool="max", distance="norm")


class ATLoss(_OfPairs):
    """Attention transfer.

    Args:
        at_pairs: by name {student, teacher: {io, path}, weight}.
        mode: "code", the mean of squares, or "paper", unsquared lengths averaged over samples.
    """

    def __init__(self, at_pairs: Pairs, mode: str = "code", **kwargs: Any):
        super().__init__(at_pairs)
        checks.choice("mode", mode, ("code", "paper"))
        self.mode = mode

    def of(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        if self.mode == "code":
            return kdkernels.attention_transfer_loss(student, teacher, pool=False)
        return kdkernels.attention_transfer_loss(student, teacher, channels="sum", distance="norm", pool=False)


class ChSimLoss(_OfPairs):
    """Inter-channel correlation (ICKD).

    Args:
        feature_pairs: by name {student, teacher: {io, path}, weight}.
    """

    def __init__(self, feature_pairs: Pairs, **kwargs: Any):
        super().__init__(feature_pairs)

    def of(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return kdkernels.ickd_loss(student, teacher)


class VIDLoss(_OfPairs):
    """Variational information distillation; the student's side is a mean and a variance (1, C, 1, 1).

    Args:
        feature_pairs: by name {student, teacher: {io, path}, weight}.
    """

    def __init__(self, feature_pairs: Pairs, **kwargs: Any):
        super().__init__(feature_pairs)

    def of(self, student: tuple[torch.Tensor, torch.Tensor], teacher: torch.Tensor) -> torch.Tensor:
        mean, variance = student[0], student[1].flatten()
        # Our loss takes what softplus makes the variance of.
        raw = variance + torch.log(-torch.expm1(-variance))
        return kdkernels.variational_information_loss(mean, teacher, raw, eps=0.0)


class PKTLoss(_OfModules):
    """Probabilistic knowledge transfer.

    Args:
        eps: added to lengths and probabilities.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        eps: float = 1e-7,
    ):
        super().__init__(student_module_path, student_module_io, teacher_module_path, teacher_module_io)
        self.eps = eps

    def of(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return kdkernels.pkt_loss(student, teacher, eps=self.eps)


class RKDLoss(_OfOutputs):
    """Relational distillation by distances and angles; the teacher gets no gradient.

    Args:
        dist_factor, angle_factor: the terms' weights; a term of weight 0 is not computed.
        reduction: "mean" or "sum".
    """

    def __init__(
        self,
        student_output_path: str,
        teacher_output_path: str,
        dist_factor: float,
        angle_factor: float,
        reduction: str,
        **kwargs: Any,
    ):
        super().__init__(student_output_path, teacher_output_path)
        checks.choice("reduction", reduction, ("mean", "sum"))
        self.dist_factor, self.angle_factor, self.reduction = dist_factor or 0.0, angle_factor or 0.0, reduction

    def of(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        teacher, reduction = teacher.detach(), self.reduction
        if not self.angle_factor:
            return self.dist_factor * kdkernels.rkd_distance_loss(student, teacher, reduction=reduction)
        if not self.dist_factor:
            return self.angle_factor * kdkernels.rkd_angle_loss(student, teacher, reduction=reduction)
        return kdkernels.rkd_loss(
            student, teacher, distance_weight=self.dist_factor, angle_weight=self.angle_factor, reduction=reduction
        )


class SPKDLoss(_OfOutputs):
    """Similarity-preserving distillation, rows over their L1 lengths.

    Args:
        reduction: "batchmean" divides by N^2, anything else by nothing.
    """

    def __init__(self, student_output_path: str, teacher_output_path: str, reduction: str, **kwargs: Any):
        super().__init__(student_output_path, teacher_output_path)
        self.reduction = reduction

    def of(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        reduction = "mean" if self.reduction == "batchmean" else "sum"
        return kdkernels.similarity_preserving_loss(student, teacher, norm="l1", reduction=reduction)


class CCKDLoss(_OfOutputs):
    """Correlation congruence, without normalising and without a square.

    Args:
        kernel_config: {type: "gaussian", gamma, max_p} or {type: "bilinear"}.
        reduction: "batchmean" divides by N^2, anything else by nothing.
    """

    def __init__(
        self,
        student_linear_path: str,
        teacher_linear_path: str,
        kernel_config: Mapping[str, Any],
        reduction: str,
        **kwargs: Any,
    ):
        super().__init__(student_linear_path, teacher_linear_path)
        self.reduction = reduction
        self.options = {"kernel": kernel_config["type"]}
        checks.choice("kernel_config['type']", kernel_config["type"], ("bilinear", "gaussian"))
        if kernel_config["type"] == "gaussian":
            self.options.update(gamma=kernel_config["gamma"], order=kernel_config["max_p"])

    def of(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return kdkernels.correlation_congruence_loss(
            student, teacher, **self.options, normalize=False, distance="frobenius",
            reduction="mean" if self.reduction == "batchmean" else "sum",
        )  # fmt: skip


class CRDLoss(ContrastMemory):
    """Contrastive representation distillation of normalised embeddings, with memory banks; of shape (1,).

    Args:
        student_norm_module_path, teacher_norm_module_path: which modules' outputs are the embeddings.
        student_empty_module_path: whose input is a dictionary with pos_idx (N,) and perhaps contrast_idx (N, 1 + K).
        input_size: features of an embedding.
        output_size, num_samples: training samples, both.
        num_negative_samples: K.
        temperature, momentum, eps: as in the authors' code.
    """

    def __init__(
        self,
        student_norm_module_path: str,
        student_empty_module_path: str,
        teacher_norm_module_path: str,
        input_size: int,
        output_size: int,
        num_negative_samples: int,
        num_samples: int,
        temperature: float = 0.07,
        momentum: float = 0.5,
        eps: float = 1e-7,
    ):
        if output_size != num_samples:
            raise ValueError(
                f"output_size and num_samples must both be the training samples, got {output_size} and {num_samples}"
            )
        super().__init__(input_size, output_size, num_negative_samples, temperature, momentum, eps)
        self.student_norm_module_path, self.teacher_norm_module_path = (
            student_norm_module_path,
            teacher_norm_module_path,
        )
        self.student_empty_module_path = student_empty_module_path

    def forward(self, student_io_dict: IO, teacher_io_dict: IO, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        student = student_io_dict[self.student_norm_module_path]["output"]
        teacher = teacher_io_dict[self.teacher_norm_module_path]["output"]
        samples = student_io_dict[self.student_empty_module_path]["input"]
        negatives = samples.get("contrast_idx")
        negatives = None if negatives is None else negatives.to(student.device)
        return super().forward(student, teacher, samples["pos_idx"].to(student.device), negatives).view(1)


class HierarchicalContextLoss(_OfModules):
    """ReviewKD's hierarchical context loss; the student's module gives its map and something else.

    Args:
        reduction: "mean".
        output_sizes: of the averages, falling; default: 4, 2, 1.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        reduction: str = "mean",
        output_sizes: list[int] | None = None,
        **kwargs: Any,
    ):
        super().__init__(student_module_path, student_module_io, teacher_module_path, teacher_module_io)
        checks.choice("reduction", reduction, ("mean",))
        self.output_sizes = [4, 2, 1] if output_sizes is None else output_sizes

    def of(self, student: tuple[torch.Tensor, Any], teacher: torch.Tensor) -> torch.Tensor:
        features, _ = student
        return kdkernels.hierarchical_context_loss(features, teacher, levels=self.output_sizes)


class DISTLoss(_OfModules):
    """DIST, times tau^2.

    Args:
        beta, gamma: the weights of the rows' and the columns' correlations.
        tau: the temperature.
        eps: the least length.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        beta: float = 1.0,
        gamma: float = 1.0,
        tau: float = 1.0,
        eps: float = 1e-8,
        **kwargs: Any,
    ):
        super().__init__(student_module_path, student_module_io, teacher_module_path, teacher_module_io)
        self.beta, self.gamma, self.tau, self.eps = beta, gamma, tau, eps

    def of(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return kdkernels.dist_loss(
            student, teacher, temperature=self.tau, beta=self.beta, gamma=self.gamma, eps=self.eps, scale_by_t2=True,
            clamp_norms=True, dim=1,
        )  # fmt: skip


LOSSES: dict[str, type[nn.Module]] = {name: globals()[name] for name in __all__ if name != "register"}
