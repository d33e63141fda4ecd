"""What every experiment is told, and training: several models side by side, and the time that each one's loss takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

# (model's logits, the teacher's, labels) -> a scalar
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """What every experiment is told.

    Attributes:
        seed: the same seed, the same numbers.
        backend: of kdkernels' losses.
        device: torch's name of one; None takes a GPU where there is one and the backend runs on it.
    """

    seed: int = 0
    backend: str = "auto"
    device: str | None = None

    def torch_device(self) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() and self.backend != "cpu" else "cpu")

    def student_seed(self, k: int) -> int:
        """Of the k-th student's first weights, images and batch order."""
        return 1000 * (self.seed + 1) + k


@dataclass
class Run:
    """One model in training, and what was seen on the way.

    Attributes:
        losses: the loss of every step.
        accuracy: on the held-out images after every epoch, in percent.
        seconds: what the loss took in every step, with its gradient down to the logits.
    """

    name: str
    model: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, images: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor) -> None:
        logits = self.model(images)
        # The loss alone between two clocks: its graph ends at a leaf that holds the logits.
        leaf = logits.detach().requires_grad_()
        wait(leaf)
        start = time.perf_counter()
        loss = self.loss(leaf, teacher_logits, labels)
        loss.backward()
        wait(leaf)
        self.seconds.append(time.perf_counter() - start)
        self.optimizer.zero_grad(set_to_none=True)
        logits.backward(leaf.grad)
        self.optimizer.step()
        self.losses.append(loss.item())


def wait(x: torch.Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def train(
    runs: Sequence[Run],
    images: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    batches: Iterable[tuple[int, torch.Tensor]],
    test: tuple[torch.Tensor, torch.Tensor],
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Trains all runs on the same batches, step by step in turn, so that whatever disturbs the clock disturbs all.

    `advance` is called once a step of each run.
    """
    current = 0
    for step, (epoch, indices) in enumerate(batches):
        if epoch != current:
            _record(runs, test)
            current = epoch
        indices = indices.to(images.device)
        batch = images[indices], teacher_logits[indices], labels[indices]
        first = step % len(runs)  # who comes first finds the batch cold
        for run in [*runs[first:], *runs[:first]]:
            run.step(*batch)
            advance()
    _record(runs, test)


def _record(runs: Sequence[Run], test: tuple[torch.Tensor, torch.Tensor]) -> None:
    for run in runs:
        run.accuracy.append(accuracy(run.model, *test))


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """In percent."""
    return 100.0 * (model(images).argmax(-1) == labels).sum().item() / len(labels)
