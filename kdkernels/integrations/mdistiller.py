"""mdistiller's loss functions, by our kernels: `from kdkernels.integrations.mdistiller import dkd_loss`.

Names, arguments, results and gradients are those of mdistiller/distillers/*.py; a distiller there uses ours once its module
holds it: `importlib.import_module("mdistiller.distillers.DKD").dkd_loss = dkd_loss`. What is deliberately not as there: a loss of
half-precision tensors is float32; dkd_loss stays finite for two classes and for a certain teacher; samples that coincide get no
gradient from each other in rkd_loss, nor do vectors of zeros.
"""

from __future__ import annotations

import torch
from torch import nn

import kdkernels
from kdkernels.integrations.repdistiller import Maps, attention, pooled_alike

__all__ = [
    "at_loss",
    "dkd_loss",
    "hcl_loss",
    "kd_loss",
    "nst_loss",
    "pkt_loss",
    "rkd_loss",
    "similarity_loss",
    "single_stage_at_loss",
    "single_stage_nst_loss",
    "sp_loss",
    "vid_loss",
]


def kd_loss(logits_student: torch.Tensor, logits_teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Hinton's distillation of logits (N, V): T^2 KL(p_t, p_s), the mean over samples."""
    return kdkernels.kl_div(logits_student, logits_teacher, temperature=temperature, dim=1)


def dkd_loss(
    logits_student: torch.Tensor,
    logits_teacher: torch.Tensor,
    target: torch.Tensor,
    alpha: float,
    beta: float,
    temperature: float,
) -> torch.Tensor:
    """Decoupled distillation of logits (N, V): T^2 (alpha TCKD + beta NCKD), the mean over samples."""
    return kdkernels.decoupled_kd_loss(
        logits_student, logits_teacher, target.reshape(-1), temperature, alpha, beta, dim=1, reduction="batchmean",
        ignore_index=-1,
    )  # fmt: skip


def rkd_loss(
    f_s: torch.Tensor,
    f_t: torch.Tensor,
    squared: bool = False,
    eps: float = 1e-12,
    distance_weight: float = 25,
    angle_weight: float = 50,
) -> torch.Tensor:
    """Relational distillation by distances and angles; the teacher gets no gradient."""
    return kdkernels.rkd_loss(
        f_s, f_t.detach(), distance_weight=distance_weight, angle_weight=angle_weight, squared=squared, eps=eps
    )


def sp_loss(g_s: Maps, g_t: Maps) -> torch.Tensor:
    """Similarity-preserving distillation, summed over layers; of shape (1,)."""
    return torch.stack([similarity_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=False)]).sum(0)


def similarity_loss(f_s: torch.Tensor, f_t: torch.Tensor) -> torch.Tensor:
    """sp_loss of one layer."""
    return kdkernels.similarity_preserving_loss(f_s, f_t).view(1)


def at_loss(g_s: Maps, g_t: Maps, p: float) -> torch.Tensor:
    """Attention transfer, summed over layers."""
    return torch.stack([attention(f_s, f_t, p) for f_s, f_t in zip(g_s, g_t, strict=False)]).sum()


def single_stage_at_loss(f_s: torch.Tensor, f_t: torch.Tensor, p: float) -> torch.Tensor:
    """at_loss of one layer."""
    return attention(f_s, f_t, p)


def nst_loss(g_s: Maps, g_t: Maps) -> torch.Tensor:
    """Neuron selectivity transfer, summed over layers."""
    return torch.stack([kdkernels.nst_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=False)]).sum()


def single_stage_nst_loss(f_s: torch.Tensor, f_t: torch.Tensor) -> torch.Tensor:
    """nst_loss of one layer."""
    return kdkernels.nst_loss(f_s, f_t)


def pkt_loss(f_s: torch.Tensor, f_t: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """Probabilistic knowledge transfer between embeddings (N, D)."""
    return kdkernels.pkt_loss(f_s, f_t, eps=eps)


def hcl_loss(fstudent: Maps, fteacher: Maps) -> torch.Tensor:
    """ReviewKD's hierarchical context loss, summed over layers."""
    return kdkernels.hierarchical_context_loss(list(fstudent), list(fteacher))


def vid_loss(
    regressor: nn.Module, log_scale: torch.Tensor, f_s: torch.Tensor, f_t: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    """Variational information distillation of one layer, by a regressor and a raw variance for every channel (C,)."""
    f_s, f_t = pooled_alike(f_s, f_t)
    return kdkernels.variational_information_loss(f_s, f_t, log_scale.to(f_s.device), adapter=regressor, eps=eps)
