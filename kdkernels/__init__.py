"""Fused kernels for knowledge-distillation losses, as drop-in PyTorch functions."""

from kdkernels.backends import BackendError, use_backend
from kdkernels.losses.logits import DistillationLoss, KLDivLoss, distillation_loss, kl_div

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "DistillationLoss",
    "KLDivLoss",
    "distillation_loss",
    "kl_div",
    "use_backend",
]
