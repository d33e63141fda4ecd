"""A student with few labels, alone and with a teacher who saw many: cross-entropy against CE + KD."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

import kdkernels
from kdkernels import backends, native
from kdkernels.console import print_table
from kdkernels.demo import data, models
from kdkernels.demo.report import gains, mean, of_students, speed
from kdkernels.demo.train import Loss, Run, Settings, accuracy, train, wait

if TYPE_CHECKING:
    from kdkernels.console import Reporter

IMAGES_PER_CLASS = 10  # what a student gets to see
BATCH, TEACHER_BATCH, HELD_OUT = 50, 64, 0.25
TEACHER_IMAGES = 1347
LARGE = (256, 32000)  # tokens, vocabulary
LARGE_REPEATS = 5
ALONE, PLAIN, FUSED = "labels alone", "CE + KD, plain PyTorch", "CE + KD, kdkernels"


@dataclass(frozen=True)
class Config(Settings):
    epochs: int = 100
    students: int = 10
    teacher_epochs: int = 12
    temperature: float = 4.0
    alpha: float = 0.9
    large: bool = True

    @property
    def steps(self) -> int:
        """Steps of all models, for a progress bar."""
        student = self.epochs * -(-IMAGES_PER_CLASS * data.CLASSES // BATCH)
        large = 2 * (LARGE_REPEATS + 1) if self.large else 0
        return self.teacher_steps + 3 * self.students * student + large

    @property
    def teacher_steps(self) -> int:
        return self.teacher_epochs * -(-TEACHER_IMAGES // TEACHER_BATCH)


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
        seed = config.student_seed(k)
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
            wait(leaf)
            start = time.perf_counter()
            loss(leaf, teacher, labels).backward()
            wait(leaf)
            mine.append(time.perf_counter() - start)
            bar.advance()
    one, other = (sorted(s[1:])[LARGE_REPEATS // 2] for s in seconds)  # the first is for warming up
    return one, other


def show(outcome: Outcome) -> None:
    """Accuracy of everybody; then the two losses against each other."""
    config, runs = outcome.config, outcome.runs
    many, few, held_out = outcome.images
    rows = [("teacher", f"{outcome.teacher_parameters}", f"{many}", f"{outcome.teacher_accuracy:.1f}", "")]
    final = {name: [run.accuracy[-1] for run in group] for name, group in runs.items()}
    for name, found in final.items():
        gain = "" if name == ALONE else mean(gains(found, final[ALONE]), "+")
        rows.append((f"student, {name}", f"{outcome.student_parameters}", f"{few}", mean(found), gain))
    print_table(
        f"Handwritten digits: accuracy in percent on {held_out} held-out images, {of_students(config.students)}",
        ("model", "parameters", "images seen", "accuracy", "gain over labels alone"),
        rows,
    )

    threads = f", {torch.get_num_threads()} threads" if outcome.device.type == "cpu" else ""
    one, other = ([s for run in runs[way] for s in run.seconds] for way in (PLAIN, FUSED))
    speeds = [
        speed(
            f"a training step, {BATCH} x {data.CLASSES} (median of {len(one)})",
            statistics.median(one),
            statistics.median(other),
        ),
    ]
    if outcome.large is not None:
        speeds.append(speed(f"a language model's size, {LARGE[0]} x {LARGE[1]}{threads}", *outcome.large))
    print_table(
        f"Time in the loss, with its gradient down to the logits, on {outcome.device}"
        + (threads and " (training has 1 thread)"),
        ("what", "plain PyTorch", "kdkernels", "ratio"),
        speeds,
    )
    difference, relative = outcome.difference()
    print(f"Largest difference between the two loss curves: {difference:.1e} ({relative:.1e} of the loss there)")
    print(f"Backend: {outcome.backend}")
    print(
        f"\nThe teacher saw {many} labelled images and a student only {few} of them, which is why a teacher helps; with all"
        "\nof the labels there is little left to gain. The three ways share initial weights, images and batch order."
        "\nAt ten classes a call is mostly overhead; what its arithmetic takes shows at a vocabulary's size."
        f"\nTimes vary; every other number comes again with --seed {config.seed}."
    )


def plot(outcome: Outcome, path: Path) -> None:
    """Accuracy by epoch, the two loss curves of the first student, and how far they are apart."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    colours = {ALONE: "tab:gray", PLAIN: "tab:blue", FUSED: "tab:orange"}
    for name, group in outcome.runs.items():
        by_epoch = list(zip(*(run.accuracy for run in group), strict=True))
        epochs = range(1, len(by_epoch) + 1)
        left.plot(
            epochs, [statistics.mean(x) for x in by_epoch], "--" if name == FUSED else "-", c=colours[name], label=name
        )
        if name != FUSED:  # it would lie on PLAIN's
            left.fill_between(
                epochs, list(map(min, by_epoch)), list(map(max, by_epoch)), color=colours[name], alpha=0.15, lw=0
            )
    left.axhline(outcome.teacher_accuracy, c="black", lw=1, ls=":", label="teacher")
    left.set(xlabel="epoch", ylabel="held-out accuracy, %", title="Accuracy (mean, lowest and highest student)")
    left.set_ylim(
        bottom=max(0.0, min(min(r.accuracy[len(r.accuracy) // 10 :]) for g in outcome.runs.values() for r in g) - 2)
    )

    for name, style in ((PLAIN, "-"), (FUSED, "--")):
        middle.plot(outcome.runs[name][0].losses, style, c=colours[name], label=name)
    middle.set(xlabel="step", ylabel="loss", title="Loss of the first student", yscale="log")

    for k, (one, other) in enumerate(zip(outcome.runs[PLAIN], outcome.runs[FUSED], strict=True)):
        gaps = [abs(x - y) for x, y in zip(one.losses, other.losses, strict=True)]
        right.plot(range(len(gaps)), gaps, ".", ms=3, label=f"student {k + 1}")
    right.set(xlabel="step", ylabel="absolute difference", title="Difference of the two curves")
    right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, ncols=1 + (axes is right))
    figure.savefig(path, dpi=120)
