"""A student with few labels, alone and with a teacher who saw many: cross-entropy against CE + KD."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

import kdkernels
from kdkernels import backends, native
from kdkernels.demo import data, models
from kdkernels.demo.train import Loss, Run, accuracy, train

if TYPE_CHECKING:
    from kdkernels.cli.console import Reporter

IMAGES_PER_CLASS = 10  # what a student gets to see
BATCH, TEACHER_BATCH, HELD_OUT = 50, 64, 0.25
TEACHER_IMAGES = 1347
LARGE = (256, 32000)  # tokens, vocabulary
LARGE_REPEATS = 5
ALONE, PLAIN, FUSED = "labels alone", "CE + KD, plain PyTorch", "CE + KD, kdkernels"


@dataclass(frozen=True)
class Config:
    seed: int = 0
    epochs: int = 100
    students: int = 10
    teacher_epochs: int = 12
    temperature: float = 4.0
    alpha: float = 0.9
    backend: str = "auto"
    device: str | None = None
    large: bool = True

    @property
    def steps(self) -> int:
        """Steps of all models, for a progress bar."""
        student = self.epochs * -(-IMAGES_PER_CLASS * data.CLASSES // BATCH)
        large = 2 * (LARGE_REPEATS + 1) if self.large else 0
        return self.teacher_epochs * -(-TEACHER_IMAGES // TEACHER_BATCH) + 3 * self.students * student + large

    def torch_device(self) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() and self.backend != "cpu" else "cpu")


@dataclass
class Outcome:
    """What the demo found.

    Attributes:
        runs: for each way of training, one finished run a student; student k of every way has the same
            initial weights, images and batch order.
        backend: what ran kdkernels' loss, e.g. "cpu (x86-64-v4)".
        large: seconds of one loss and gradient at a language model's size, plain and fused.
    """

    config: Config
    device: torch.device
    teacher_accuracy: float
    teacher_parameters: int
    images: tuple[int, int, int]  # the teacher's, a student's, held out
    backend: str
    runs: dict[str, list[Run]] = field(default_factory=dict)
    large: tuple[float, float] | None = None

    @property
    def student_parameters(self) -> int:
        return models.parameters(self.runs[FUSED][0].model)

    def difference(self) -> tuple[float, float]:
        """The largest difference between the two loss curves, and relative to the loss there."""
        pairs = [
            (abs(x - y), abs(x - y) / max(abs(x), 1e-30))
            for one, other in zip(self.runs[PLAIN], self.runs[FUSED], strict=True)
            for x, y in zip(one.losses, other.losses, strict=True)
        ]
        return max(pairs)


def labels_alone(logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels)


def plain(temperature: float, alpha: float) -> Loss:
    """The lines that people write."""

    def loss(logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        soft = F.kl_div(
            F.log_softmax(logits / temperature, dim=-1),
            F.softmax(teacher_logits / temperature, dim=-1),
            reduction="batchmean",
        )
        return (1 - alpha) * F.cross_entropy(logits, labels) + alpha * temperature**2 * soft

    return loss


def fused(temperature: float, alpha: float, backend: str) -> Loss:
    def loss(logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return kdkernels.distillation_loss(logits, teacher_logits, labels, temperature, alpha, backend=backend)

    return loss


def run(config: Config, bar: Reporter) -> Outcome:
    """Trains a teacher, then every student three ways."""
    device = config.torch_device()
    backend = backends.resolve("distillation_loss", (torch.empty(0, device=device),), config.backend)
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False), one_thread():
        outcome = _train(config, bar, device, backend)
    if config.large:
        bar.step("the loss at a language model's size")
        losses = plain(config.temperature, config.alpha), fused(config.temperature, config.alpha, config.backend)
        outcome.large = _time_large(losses, device, bar)
    return outcome


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Models this small only lose by sharing their work, and the numbers do not depend on the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def trained_teacher(config: Config, digits: data.Digits, device: torch.device, bar: Reporter) -> torch.nn.Module:
    """A teacher who saw all labels."""
    bar.step("teacher")
    teacher = models.seeded(models.teacher, config.seed, device)
    order = torch.Generator().manual_seed(config.seed)
    train(
        [Run("teacher", teacher, labels_alone, torch.optim.Adam(teacher.parameters(), 2e-3))],
        digits.images, torch.zeros(len(digits.labels), data.CLASSES, device=device), digits.labels,
        data.batches(len(digits.labels), TEACHER_BATCH, config.teacher_epochs, order),
        (digits.test_images, digits.test_labels), bar.advance,
    )  # fmt: skip
    return teacher


def described(backend: str) -> str:
    """A backend's name, with the instruction set where it is the CPU's."""
    return f"{backend} ({native.cpu_target().removeprefix('cpu.')})" if backend == "cpu" else backend


def _train(config: Config, bar: Reporter, device: torch.device, backend: str) -> Outcome:
    digits = data.digits(config.seed, HELD_OUT).to(device)
    test = digits.test_images, digits.test_labels

    teacher = trained_teacher(config, digits, device, bar)
    with torch.no_grad():
        teacher_logits = teacher(digits.images)

    outcome = Outcome(
        config, device, accuracy(teacher, *test), models.parameters(teacher),
        (len(digits.labels), IMAGES_PER_CLASS * data.CLASSES, len(digits.test_labels)), described(backend),
    )  # fmt: skip
    losses = {
        ALONE: labels_alone,
        PLAIN: plain(config.temperature, config.alpha),
        FUSED: fused(config.temperature, config.alpha, config.backend),
    }
    for k in range(config.students):
        bar.step(f"student {k + 1} of {config.students}")
        seed = 1000 * (config.seed + 1) + k
        order = torch.Generator().manual_seed(seed)
        seen = data.few_of_each(digits.labels.cpu(), IMAGES_PER_CLASS, order).to(device)
        runs = []
        for name, loss in losses.items():
            student = models.seeded(models.student, seed, device)
            runs.append(Run(name, student, loss, torch.optim.SGD(student.parameters(), 0.05, momentum=0.9)))
            outcome.runs.setdefault(name, []).append(runs[-1])
        train(
            runs, digits.images[seen], teacher_logits[seen], digits.labels[seen],
            data.batches(len(seen), BATCH, config.epochs, order), test, bar.advance,
        )  # fmt: skip
    return outcome


def _time_large(losses: tuple[Loss, Loss], device: torch.device, bar: Reporter) -> tuple[float, float]:
    """Seconds of loss and gradient on random logits: the medians of calls in turn."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(LARGE, generator=generator).to(device) for _ in range(2))
    labels = torch.randint(LARGE[1], LARGE[:1], generator=generator).to(device)
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(LARGE_REPEATS + 1):
        for loss, mine in zip(losses, seconds, strict=True):
            leaf = student.detach().requires_grad_()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            loss(leaf, teacher, labels).backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            mine.append(time.perf_counter() - start)
            bar.advance()
    one, other = (sorted(s[1:])[LARGE_REPEATS // 2] for s in seconds)  # the first is for warming up
    return one, other
