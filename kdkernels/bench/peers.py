"""Other libraries' versions of the same losses, called as their users call them.

A peer is a function that imports its library and returns loss(**inputs, **options). To add one,
decorate it here; what is not installed is listed as such, and what computes something else is
refused by the correctness gate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from kdkernels.bench.environment import version
from kdkernels.bench.inputs import Loss
from kdkernels.ops.registry import Case


@dataclass(frozen=True)
class Peer:
    """One library's version of some cases.

    Attributes:
        package: its name on PyPI.
        cases: the registry's names of what it computes.
        devices: where it runs.
        load: imports it and makes the loss.
    """

    package: str
    cases: tuple[str, ...]
    devices: tuple[str, ...]
    load: Callable[[], Loss]


PEERS: list[Peer] = []


def peer(package: str, cases: tuple[str, ...], devices: tuple[str, ...] = ("cpu", "cuda")) -> Callable[[Any], Any]:
    def add(load: Callable[[], Loss]) -> Callable[[], Loss]:
        PEERS.append(Peer(package, cases, devices, load))
        return load

    return add


def contenders(case: Case, device: torch.device) -> tuple[dict[str, Loss], dict[str, str]]:
    """(name -> loss of the peers that run, name -> why the others do not) for one case."""
    found: dict[str, Loss] = {}
    absent: dict[str, str] = {}
    for p in PEERS:
        if case.name not in p.cases:
            continue
        if version(p.package) is None:
            absent[p.package] = "not installed"
        elif device.type not in p.devices:
            absent[p.package] = f"does not run on {device.type}"
        else:
            try:
                found[p.package] = p.load()
            except Exception as error:  # whatever a foreign package raises on import
                absent[p.package] = f"does not import: {type(error).__name__}: {error}"
    return found, absent


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, -2)


@peer("liger-kernel", ("kl_div",), devices=("cuda",))
def liger_kl_div() -> Loss:
    from liger_kernel.transformers import LigerKLDIVLoss

    kl = LigerKLDIVLoss(reduction="batchmean")

    def loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        log_p = F.log_softmax(_rows(student_logits) / temperature, -1)
        return kl(log_p, F.softmax(_rows(teacher_logits) / temperature, -1)) * temperature**2

    return loss


@peer("liger-kernel", ("js_div",), devices=("cuda",))
def liger_jsd() -> Loss:
    from liger_kernel.transformers import LigerJSD

    def loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, beta: float = 0.5):
        log_q = F.log_softmax(_rows(student_logits) / temperature, -1)
        return LigerJSD(beta)(log_q, F.log_softmax(_rows(teacher_logits) / temperature, -1)) * temperature**2

    return loss


@peer("liger-kernel", ("linear_js_div",))
def liger_linear_js_div() -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def loss(
        student_hidden: torch.Tensor, student_weight: torch.Tensor, teacher_hidden: torch.Tensor,
        teacher_weight: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        jsd = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.5, compiled=student_hidden.is_cuda)
        student, teacher = _rows(student_hidden), _rows(teacher_hidden)
        labels = torch.zeros(student.shape[0], dtype=torch.int64, device=student.device)  # of a term of weight 0
        return jsd(student, student_weight, teacher, teacher_weight, labels)

    return loss


def _trl() -> Any:
    try:
        from trl.experimental.gkd.gkd_trainer import GKDTrainer
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("trl"):
            raise  # something that it needs is missing
        from trl import GKDTrainer
    return GKDTrainer.generalized_jsd_loss


@peer("trl", ("kl_div",))
def trl_kl_div() -> Loss:
    jsd = _trl()

    def loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        return jsd(_rows(student_logits), _rows(teacher_logits), beta=0, temperature=temperature) * temperature**2

    return loss


@peer("trl", ("js_div",))
def trl_jsd() -> Loss:
    jsd = _trl()

    def loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, beta: float = 0.5):
        return jsd(_rows(student_logits), _rows(teacher_logits), beta=beta, temperature=temperature) * temperature**2

    return loss


@peer("torchdistill", ("kl_div",))
def torchdistill_kl_div() -> Loss:
    from torchdistill.losses.mid_level import KDLoss

    def loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        kd = KDLoss("head", "output", "head", "output", temperature, alpha=0)  # alone: without T^2
        return temperature**2 * kd({"head": {"output": student_logits}}, {"head": {"output": teacher_logits}})

    return loss


@peer("torchdistill", ("distillation_loss",))
def torchdistill_distillation_loss() -> Loss:
    from torchdistill.losses.mid_level import KDLoss

    def loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor, temperature: float = 4.0,
             alpha: float = 0.9) -> torch.Tensor:  # fmt: skip
        kept = labels != -100  # its KL has no ignore_index
        kd = KDLoss("head", "output", "head", "output", temperature, alpha=1 - alpha)
        student, teacher = {"head": {"output": student_logits[kept]}}, {"head": {"output": teacher_logits[kept]}}
        return kd(student, teacher, labels[kept])

    return loss
