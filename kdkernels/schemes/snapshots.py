"""Teachers that are a model's own past: an earlier epoch, a fixed anchor, the model before a new task."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import nn

from kdkernels import checks
from kdkernels.features.capture import unwrapped
from kdkernels.losses.logits import kl_div
from kdkernels.losses.structured import lwf_loss
from kdkernels.schemes.copies import FrozenCopy
from kdkernels.typed import typed


class SnapshotTeacher(FrozenCopy):
    """A frozen copy of a model, renewed when you say so: the student of an earlier epoch as its own teacher.

        teacher = SnapshotTeacher(student)
        for epoch in range(epochs):
            for x, y in loader:
                loss = kdkernels.distillation_loss(student(x), teacher(x), y, 1.0, alpha(epoch))
                ...
            teacher.update(student)

    Kim et al., PS-KD (2021, arXiv:2006.12000), with alpha = Linear(0, 0.8, epochs); Yang et al., snapshot distillation
    (2019, arXiv:1812.00123), who renew it once a cycle of the learning rate. Never renewed, it is a fixed teacher.
    The copy is in eval mode, requires no gradient, and is renewed in place, so that compiled code stays valid.

    Args:
        model: what to copy; it may be wrapped in DistributedDataParallel or compiled.
    """

    @typed
    def __init__(self, model: nn.Module):
        super().__init__(model)

    def update(self, model: nn.Module) -> None:
        """Takes the model's present weights and buffers.

        Raises:
            RuntimeError: another model than was copied, as load_state_dict.
        """
        self.model.load_state_dict(unwrapped(model).state_dict())


def anchor_distillation_loss(
    student_logits: torch.Tensor, anchor_logits: torch.Tensor, *, anchor_weight: float = 0.5, **options: Any
) -> torch.Tensor:
    """Divergence from a teacher made of a fixed snapshot and of the present model itself.

    KL(a p_anchor + (1 - a) p_now, p_s), where p_now is the student's own prediction without a gradient: a = 1 is plain
    distillation from the snapshot, and less of it holds the model less to its past. At the anchor itself the loss and its
    gradient are 0; the gradient is a times that of the anchor alone, while the value tells the distance to the mixture.

    Args:
        student_logits: scores, (..., V).
        anchor_logits: the snapshot's, of that shape; they get no gradient.
        anchor_weight: a, between 0 and 1.
        options: keyword arguments of `kl_div` (temperature, weight, reduction, backend, ...), but not
            teacher_temperature, from_log_probs and dim.

    Raises:
        ValueError, TypeError, BackendError: as kl_div; TypeError for an option that is excepted.
    """
    checks.plain_number("anchor_weight", anchor_weight, low=0, high=1)
    for name in ("teacher_temperature", "from_log_probs", "dim"):
        if name in options:
            raise TypeError(f"anchor_distillation_loss has no option {name!r}")
    checks.scores("student_logits", student_logits, "anchor_logits", anchor_logits, -1)
    temperature = options.get("temperature", 1.0)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.detach()
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    now, anchor = (x.detach().to(wide).div(temperature).softmax(-1) for x in (student_logits, anchor_logits))
    mixture = torch.lerp(now, anchor, anchor_weight).log() * temperature
    return kl_div(student_logits, mixture, **options)


class LearningWithoutForgetting(nn.Module):
    """What a model said about its old tasks, kept while it learns new ones from their data alone.

        memory = LearningWithoutForgetting()
        for task, loader in tasks.items():
            for x, y in loader:
                out = model(x)                            # {task: scores}
                loss = cross_entropy(out[task], y) + memory(out, x)
                ...
            memory.remember(model, task)

    Li and Hoiem (2016, arXiv:1606.09282): the sum over the old tasks of `lwf_loss` between the model's scores on the new
    task's data and those of the model as it was when the last task ended.

    Args:
        weight: of the whole term (the paper's lambda_o, 1).
        options: keyword arguments of `lwf_loss` (temperature 2, uniform, backend, ...).
    """

    def __init__(self, weight: float = 1.0, **options: Any):
        super().__init__()
        checks.plain_number("weight", weight, low=0)
        self.weight, self.options = weight, options
        self.tasks: list[Hashable] = []
        self.teacher: SnapshotTeacher | None = None

    def remember(self, model: nn.Module, task: Hashable) -> None:
        """Ends a task: a frozen copy of the model, whose scores for it and all earlier tasks are to be kept."""
        self.teacher = SnapshotTeacher(model)
        if task not in self.tasks:
            self.tasks.append(task)

    def forward(self, outputs: Mapping[Any, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor | float:
        """The term for a batch: the model's `outputs` by task, and the arguments that it was called with; first 0.

        Raises:
            KeyError: the outputs lack an old task.
        """
        if self.teacher is None:
            return 0.0
        missing = [task for task in self.tasks if task not in outputs]
        if missing:
            raise KeyError(f"outputs lack the old tasks {missing}; they have {list(outputs)}")
        old = self.teacher(*args, **kwargs)
        terms = [lwf_loss(outputs[task], old[task], **self.options) for task in self.tasks]
        return self.weight * torch.stack(terms).sum()
