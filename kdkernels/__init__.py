"""Fused kernels for knowledge-distillation losses, as drop-in PyTorch functions."""

from kdkernels.backends import BackendError, use_backend
from kdkernels.losses.logits import DistillationLoss, KLDivLoss, distillation_loss, kl_div
from kdkernels.losses.relational import (
    HardDarkRankLoss,
    RKDAngleLoss,
    RKDDistanceLoss,
    RKDLoss,
    hard_dark_rank_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    rkd_loss,
)
from kdkernels.losses.sparse import TopKDivLoss, ULDLoss, topk_div, uld_loss, union_support

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "DistillationLoss",
    "HardDarkRankLoss",
    "KLDivLoss",
    "RKDAngleLoss",
    "RKDDistanceLoss",
    "RKDLoss",
    "TopKDivLoss",
    "ULDLoss",
    "distillation_loss",
    "hard_dark_rank_loss",
    "kl_div",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "rkd_loss",
    "topk_div",
    "uld_loss",
    "union_support",
    "use_backend",
]
