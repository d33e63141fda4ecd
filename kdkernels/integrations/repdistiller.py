"""RepDistiller's losses (distiller_zoo and crd), by our kernels: change the import and nothing else.

    from kdkernels.integrations.repdistiller import DistillKL, Attention, RKDLoss

Names, constructor and call arguments, results and gradients are RepDistiller's: Attention, Similarity, NSTLoss and FSP take
lists of maps and return a list of losses; Similarity's and CRDLoss's have shape (1,). What is deliberately not as there:

* A loss of half-precision tensors is float32, computed in float32 throughout.
* Samples that coincide get no gradient from each other in RKDLoss (there: theirs divided by 1e-12), nor do vectors of
  zeros; PKT does not write into what it is given.
* CRDLoss needs no GPU, prints nothing, and draws its negatives from torch's generator in another order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import kdkernels

__all__ = [
    "FSP",
    "PKT",
    "Attention",
    "CRDLoss",
    "Correlation",
    "DistillKL",
    "HintLoss",
    "NSTLoss",
    "RKDLoss",
    "Similarity",
    "VIDLoss",
]

Maps = Sequence[torch.Tensor]


class DistillKL(nn.Module):
    """Hinton's distillation of logits (N, V): T^2 KL(p_t, p_s) / N.

    Args:
        T: the temperature.
    """

    def __init__(self, T: float):
        super().__init__()
        self.T = T

    def forward(self, y_s: torch.Tensor, y_t: torch.Tensor) -> torch.Tensor:
        return kdkernels.kl_div(y_s, y_t, temperature=self.T, dim=1, reduction="batchmean")


class HintLoss(nn.Module):
    """FitNets: the mean squared difference of two features of one shape."""

    def forward(self, f_s: torch.Tensor, f_t: torch.Tensor) -> torch.Tensor:
        return kdkernels.hint_loss(f_s, f_t)


def attention(f_s: torch.Tensor, f_t: torch.Tensor, p: float) -> torch.Tensor:
    """Attention transfer of one layer, with x^p where that exists for a negative x."""
    return kdkernels.attention_transfer_loss(f_s, f_t, p=p, signed=p % 1 == 0)


class Attention(nn.Module):
    """Attention transfer, one loss a layer.

    Args:
        p: the power of the activations.
    """

    def __init__(self, p: float = 2):
        super().__init__()
        self.p = p

    def forward(self, g_s: Maps, g_t: Maps) -> list[torch.Tensor]:
        return [self.at_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=False)]

    def at_loss(self, f_s: torch.Tensor, f_t: torch.Tensor) -> torch.Tensor:
        return attention(f_s, f_t, self.p)


class Similarity(nn.Module):
    """Similarity-preserving distillation, one loss of shape (1,) a layer."""

    def forward(self, g_s: Maps, g_t: Maps) -> list[torch.Tensor]:
        return [self.similarity_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=False)]

    def similarity_loss(self, f_s: torch.Tensor, f_t: torch.Tensor) -> torch.Tensor:
        return kdkernels.similarity_preserving_loss(f_s, f_t).view(1)


class Correlation(nn.Module):
    """Correlation congruence in its simplified form, between consecutive samples of two embeddings (N, D)."""

    def forward(self, f_s: torch.Tensor, f_t: torch.Tensor) -> torch.Tensor:
        return kdkernels.correlation_congruence_loss(f_s, f_t, kernel="neighbours")


class RKDLoss(nn.Module):
    """Relational distillation by distances and angles; the teacher gets no gradient.

    Args:
        w_d, w_a: the weights of the two terms.
    """

    def __init__(self, w_d: float = 25, w_a: float = 50):
        super().__init__()
        self.w_d = w_d
        self.w_a = w_a

    def forward(self, f_s: torch.Tensor, f_t: torch.Tensor) -> torch.Tensor:
        return kdkernels.rkd_loss(f_s, f_t.detach(), distance_weight=self.w_d, angle_weight=self.w_a)


class PKT(nn.Module):
    """Probabilistic knowledge transfer between embeddings (N, D)."""

    def forward(self, f_s: torch.Tensor, f_t: torch.Tensor) -> torch.Tensor:
        return self.cosine_similarity_loss(f_s, f_t)

    @staticmethod
    def cosine_similarity_loss(output_net: torch.Tensor, target_net: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
        return kdkernels.pkt_loss(output_net, target_net, eps=eps)


class NSTLoss(nn.Module):
    """Neuron selectivity transfer, one loss a layer."""

    def forward(self, g_s: Maps, g_t: Maps) -> list[torch.Tensor]:
        return [self.nst_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=False)]

    def nst_loss(self, f_s: torch.Tensor, f_t: torch.Tensor) -> torch.Tensor:
        return kdkernels.nst_loss(f_s, f_t)


class FSP(nn.Module):
    """Flow of solution procedure, one loss for each two consecutive layers.

    Args:
        s_shapes, t_shapes: the shapes of the student's and the teacher's maps, whose channels must be the same.
    """

    def __init__(self, s_shapes: Sequence[Sequence[int]], t_shapes: Sequence[Sequence[int]]):
        super().__init__()
        s_channels, t_channels = [s[1] for s in s_shapes], [t[1] for t in t_shapes]
        if s_channels != t_channels:
            raise ValueError(f"s_shapes and t_shapes must have the same channels, got {s_channels} and {t_channels}")

    def forward(self, g_s: Maps, g_t: Maps) -> list[torch.Tensor]:
        return [kdkernels.fsp_loss(g_s[i], g_s[i + 1], g_t[i], g_t[i + 1]) for i in range(min(len(g_s), len(g_t)) - 1)]


def pooled_alike(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two maps (N, C, H, W), the larger of them averaged down to the height of the other."""
    size = min(a.shape[2], b.shape[2])
    return tuple(x if x.shape[2] == size else F.adaptive_avg_pool2d(x, size) for x in (a, b))  # type: ignore[return-value]


class VIDLoss(nn.Module):
    """Variational information distillation, with its three 1x1 convolutions and a variance for every channel.

    Weights and their names in the state_dict are RepDistiller's, so that its checkpoints load.

    Args:
        num_input_channels, num_mid_channel, num_target_channels: of the student, between the convolutions, of the teacher.
        init_pred_var: where every variance begins.
        eps: the least variance.
    """

    def __init__(
        self,
        num_input_channels: int,
        num_mid_channel: int,
        num_target_channels: int,
        init_pred_var: float = 5.0,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.regressor = nn.Sequential(
            nn.Conv2d(num_input_channels, num_mid_channel, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(num_mid_channel, num_mid_channel, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(num_mid_channel, num_target_channels, 1, bias=False),
        )
        self.log_scale = nn.Parameter(torch.full((num_target_channels,), math.log(math.expm1(init_pred_var - eps))))
        self.eps = eps

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        input, target = pooled_alike(input, target)
        return kdkernels.variational_information_loss(
            input, target, self.log_scale, adapter=self.regressor, eps=self.eps
        )


class Embed(nn.Module):
    """A linear layer, then lengths of 1."""

    def __init__(self, dim_in: int = 1024, dim_out: int = 128):
        super().__init__()
        self.linear = nn.Linear(dim_in, dim_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.linear(x.flatten(1)))


class ContrastMemory(nn.Module):
    """The memory banks of CRD, (samples, features) for each model, and what its loss needs beside them.

    The entries of `params` are K, T, the two normalisers (-1 before the first batch sets them) and the banks' momentum.
    """

    params: torch.Tensor
    memory_v1: torch.Tensor
    memory_v2: torch.Tensor

    def __init__(self, features: int, samples: int, K: int, T: float = 0.07, momentum: float = 0.5, eps: float = 1e-7):
        super().__init__()
        self.K, self.T, self.momentum, self.eps = K, T, momentum, eps
        self._normalised = False  # known on the host, so that only the first batch waits for the device
        self.register_buffer("params", torch.tensor([K, T, -1, -1, momentum]))
        bound = 1.0 / math.sqrt(features / 3)
        self.register_buffer("memory_v1", torch.empty(samples, features).uniform_(-bound, bound))
        self.register_buffer("memory_v2", torch.empty(samples, features).uniform_(-bound, bound))

    def forward(
        self, v1: torch.Tensor, v2: torch.Tensor, y: torch.Tensor, idx: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss of embeddings of length 1, whose entries in the banks move towards them afterwards."""
        if idx is None:
            idx = torch.randint(self.memory_v1.shape[0], (v1.shape[0], self.K + 1), device=v1.device)
            idx[:, 0] = y
        if not self._normalised:
            self._normalise(v1, v2, idx)
        loss = kdkernels.crd_loss(
            v1, v2, self.memory_v1, self.memory_v2, idx, temperature=self.T,
            normalizers=(self.params[2].clone(), self.params[3].clone()), eps=self.eps,
        )  # fmt: skip
        with torch.no_grad():
            # New banks, as the backward still wants the old ones.
            self.memory_v1, self.memory_v2 = self._moved(self.memory_v1, v1, y), self._moved(self.memory_v2, v2, y)
        return loss

    @torch.no_grad()
    def _normalise(self, v1: torch.Tensor, v2: torch.Tensor, idx: torch.Tensor) -> None:
        for place, x, bank in ((2, v1, self.memory_v2), (3, v2, self.memory_v1)):
            if float(self.params[place]) < 0:
                means = [(bank[i] @ row.to(bank.dtype) / self.T).exp().mean() for i, row in zip(idx, x, strict=True)]
                self.params[place] = torch.stack(means).mean() * bank.shape[0]
        self._normalised = True

    def _moved(self, bank: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        moved = self.momentum * bank[y] + (1 - self.momentum) * x.to(bank.dtype)
        return bank.index_copy(0, y, moved / moved.norm(dim=1, keepdim=True))


class CRDLoss(nn.Module):
    """Contrastive representation distillation with its embeddings and memory banks.

    The names in the state_dict are RepDistiller's.

    Args:
        opt: what has the attributes s_dim, t_dim (features of the models), feat_dim (of the embeddings), n_data (training
            samples), nce_k (negatives), nce_t (temperature) and nce_m (the banks' momentum).
    """

    def __init__(self, opt: Any):
        super().__init__()
        self.embed_s = Embed(opt.s_dim, opt.feat_dim)
        self.embed_t = Embed(opt.t_dim, opt.feat_dim)
        self.contrast = ContrastMemory(opt.feat_dim, opt.n_data, opt.nce_k, opt.nce_t, opt.nce_m)

    def forward(
        self, f_s: torch.Tensor, f_t: torch.Tensor, idx: torch.Tensor, contrast_idx: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss, of shape (1,).

        Args:
            f_s, f_t: features (N, s_dim) and (N, t_dim).
            idx: which training samples they are, (N,).
            contrast_idx: (N, 1 + nce_k), each sample's own index and its negatives'; default: drawn.
        """
        return self.contrast(self.embed_s(f_s), self.embed_t(f_t), idx, contrast_idx).view(1)
