"""Which digit does each pixel of a stroke belong to: students of few labelled images, alone and with a teacher.

Labels are made from the digits themselves: a pixel that is inked belongs to its digit's class, any other to the
background. The teacher's answers on images of which the student sees no label are matched pixel by pixel, or channel by
channel (CWD).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

import kdkernels
from kdkernels import backends
from kdkernels.console import print_table
from kdkernels.demo import classification, data, models
from kdkernels.demo.report import gains, mean, of_students, speed
from kdkernels.demo.train import wait

if TYPE_CHECKING:
    from kdkernels.console import Reporter

CLASSES = data.CLASSES + 1  # and the background
INK = 0.3
BATCH, UNLABELLED = 20, 64
LOGIT_WEIGHT = {"pixel-wise": 1.0, "channel-wise (CWD)": 0.3}
TEMPERATURE = {"pixel-wise": 1.0, "channel-wise (CWD)": 4.0}
ALONE = "labels alone"
MapLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Config(classification.Config):
    large: bool = False

    @property
    def steps(self) -> int:
        student = self.epochs * -(-classification.IMAGES_PER_CLASS * data.CLASSES // BATCH)
        return self.teacher_steps + (1 + 2 * len(LOGIT_WEIGHT)) * self.students * student


@dataclass
class Pupil:
    """One model in training: its losses, its mean IoU at the end, and the seconds of its distillation loss."""

    losses: list[float] = field(default_factory=list)
    iou: float = 0.0
    seconds: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    """What the demo found: for each way of training, one pupil a student."""

    config: Config
    device: torch.device
    backend: str
    teacher_iou: float
    images: tuple[int, int, int]  # the teacher's, a student's, held out
    pupils: dict[str, list[Pupil]] = field(default_factory=dict)

    def difference(self) -> float:
        """The largest difference between the loss curves of the two implementations, relative to the loss there."""
        gaps = [
            abs(x - y) / max(abs(x), 1e-30)
            for name in LOGIT_WEIGHT
            for one, other in zip(self.pupils[f"{name}, plain PyTorch"], self.pupils[f"{name}, kdkernels"], strict=True)
            for x, y in zip(one.losses, other.losses, strict=True)
        ]
        return max(gaps)


def teacher() -> nn.Module:
    """Convolutions that make out the digit, and scores of every class at every pixel from what they found."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.ReLU(),
        nn.Linear(128, CLASSES * 8 * 8), nn.Unflatten(1, (CLASSES, 8, 8)),
    )  # fmt: skip


def student() -> nn.Module:
    """A perceptron with one narrow hidden layer."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, CLASSES * 8 * 8), nn.Unflatten(1, (CLASSES, 8, 8))
    )


def pixel_labels(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(n, 8, 8): 0 for the background, 1 + the digit where there is ink."""
    return torch.where(images[:, 0] > INK, labels[:, None, None] + 1, 0)


@torch.no_grad()
def mean_iou(model: nn.Module, images: torch.Tensor, pixels: torch.Tensor) -> float:
    """Intersection over union of each class over all images, averaged, in percent."""
    known = F.one_hot(pixels, CLASSES).bool()
    said = F.one_hot(model(images).argmax(1), CLASSES).bool()
    both, either = (known & said).sum((0, 1, 2)), (known | said).sum((0, 1, 2))
    return 100.0 * (both / either.clamp_min(1)).mean().item()


def ways_of(backend: str) -> dict[str, tuple[str, MapLoss | None]]:
    """For each way of training, the loss's name and the loss: none, the lines that people write, and these kernels."""

    def pixel_wise(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        by = TEMPERATURE["pixel-wise"]
        kl = F.kl_div((s / by).log_softmax(1), (t / by).softmax(1), reduction="none").sum(1)
        return by**2 * kl.mean()

    def channel_wise(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        by = TEMPERATURE["channel-wise (CWD)"]
        s, t = s.flatten(2) / by, t.flatten(2) / by
        return by**2 * F.kl_div(s.log_softmax(2), t.softmax(2), reduction="sum") / s[..., 0].numel()

    def fused(function: Callable[..., torch.Tensor], temperature: float) -> MapLoss:
        return lambda s, t: function(s, t, temperature=temperature, backend=backend)

    kernels = {"pixel-wise": kdkernels.pixel_wise_div, "channel-wise (CWD)": kdkernels.channel_wise_div}
    ways: dict[str, tuple[str, MapLoss | None]] = {ALONE: ("", None)}
    for name, plain in (("pixel-wise", pixel_wise), ("channel-wise (CWD)", channel_wise)):
        ways[f"{name}, plain PyTorch"] = name, plain
        ways[f"{name}, kdkernels"] = name, fused(kernels[name], TEMPERATURE[name])
    return ways


def run(config: Config, bar: Reporter) -> Outcome:
    """Trains a teacher, then every student each way."""
    device = config.torch_device()
    backend = backends.resolve("pixel_wise_div", (torch.empty(0, device=device),), config.backend)
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False), classification.one_thread():
        digits = data.digits(config.seed, classification.HELD_OUT).to(device)
        pixels = pixel_labels(digits.images, digits.labels)
        test = digits.test_images, pixel_labels(digits.test_images, digits.test_labels)
        bar.step("teacher")
        model = models.seeded(teacher, config.seed, device)
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        order = torch.Generator().manual_seed(config.seed)
        for _, chosen in data.batches(len(pixels), classification.TEACHER_BATCH, config.teacher_epochs, order):
            loss = F.cross_entropy(model(digits.images[chosen.to(device)]), pixels[chosen.to(device)])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            bar.advance()
        with torch.no_grad():
            targets = model(digits.images)
        outcome = Outcome(
            config, device, classification.described(backend), mean_iou(model, *test),
            (len(pixels), classification.IMAGES_PER_CLASS * data.CLASSES, len(test[1])),
        )  # fmt: skip
        for k in range(config.students):
            bar.step(f"student {k + 1} of {config.students}")
            for way, (name, distil) in ways_of(config.backend).items():
                pupil = _train_student(
                    config, digits.images, pixels, targets, distil, LOGIT_WEIGHT.get(name, 0.0), k, test, bar
                )
                outcome.pupils.setdefault(way, []).append(pupil)
    return outcome


def _train_student(
    config: Config, images: torch.Tensor, pixels: torch.Tensor, targets: torch.Tensor, distil: MapLoss | None,
    weight: float, k: int, test: tuple[torch.Tensor, torch.Tensor], bar: Reporter,
) -> Pupil:  # fmt: skip
    device, seed, pupil = images.device, config.student_seed(k), Pupil()
    order, draw = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    seen = data.few_of_each(pixels.flatten(1).amax(1).cpu() - 1, classification.IMAGES_PER_CLASS, order).to(device)
    model = models.seeded(student, seed, device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _, chosen in data.batches(len(seen), BATCH, config.epochs, order):
        at = seen[chosen.to(device)]
        loss = F.cross_entropy(model(images[at]), pixels[at])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        value = loss.item()
        if distil is not None:
            more = torch.randint(len(images), (UNLABELLED,), generator=draw).to(device)
            scores = model(images[more])
            leaf = scores.detach().requires_grad_()
            wait(leaf)
            start = time.perf_counter()
            matched = distil(leaf, targets[more])
            matched.backward()
            wait(leaf)
            pupil.seconds.append(time.perf_counter() - start)
            scores.backward(weight * leaf.grad)
            value += weight * matched.item()
        optimizer.step()
        pupil.losses.append(value)
        bar.advance()
    pupil.iou = mean_iou(model, *test)
    return pupil


def show(outcome: Outcome) -> None:
    """Mean IoU of everybody, with and without a teacher; then the two implementations against each other."""
    config = outcome.config
    many, few, held_out = outcome.images
    alone = [p.iou for p in outcome.pupils[ALONE]]
    rows = [("teacher", f"{outcome.teacher_iou:.1f}", "")]
    for way, pupils in outcome.pupils.items():
        found = [p.iou for p in pupils]
        label = way if way == ALONE else f"labels + {way}"
        rows.append((f"student, {label}", mean(found), "" if way == ALONE else mean(gains(found, alone), "+")))
    print_table(
        f"Strokes of handwritten digits: mean IoU in percent on {held_out} held-out images, {of_students(config.students)}",
        ("model", "mean IoU", "gain over labels alone"),
        rows,
    )
    speeds = []
    for name in LOGIT_WEIGHT:
        one, other = (
            statistics.median(s for p in outcome.pupils[f"{name}, {way}"] for s in p.seconds)
            for way in ("plain PyTorch", "kdkernels")
        )
        speeds.append(speed(f"{name}, {UNLABELLED} images of {CLASSES} x 8 x 8", one, other))
    print_table(
        f"Time in the loss, with its gradient down to the scores, on {outcome.device}",
        ("what", "plain PyTorch", "kdkernels", "ratio"),
        speeds,
    )
    print(f"Largest difference between two loss curves: {outcome.difference():.1e} of the loss there")
    print(f"Backend: {outcome.backend}")
    print(
        f"\nThe teacher saw {many} labelled images and a student {few} of them; the teacher's scores are matched on"
        f"\n{UNLABELLED} of all those images in each step, without labels. All ways share initial weights, images and batch"
        f"\norder. Times vary; every other number comes again with --seed {config.seed}."
    )


def plot(outcome: Outcome, path: Path) -> None:
    """Mean IoU of every way, and the losses of the first student."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(outcome.pupils)
    left.barh(names, [statistics.mean(p.iou for p in outcome.pupils[n]) for n in names])
    left.axvline(outcome.teacher_iou, c="black", lw=1, ls=":")
    left.invert_yaxis()
    left.set(xlabel="mean IoU, % (dotted: the teacher)")
    for name, style in zip(names, (":", "-", "--", "-", "--")):
        right.plot(outcome.pupils[name][0].losses, style, label=name)
    right.set(xlabel="step", ylabel="loss", title="Loss of the first student", yscale="log")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
