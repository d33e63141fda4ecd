"""A student with few labels, trained as one of kdkernels.schemes has it and by labels alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

import kdkernels
from kdkernels import backends, schemes
from kdkernels.cli.console import print_table
from kdkernels.demo import classification, data, models
from kdkernels.demo.report import mean
from kdkernels.demo.train import accuracy

if TYPE_CHECKING:
    from kdkernels.cli.console import Reporter

IMAGES_PER_CLASS, BATCH = classification.IMAGES_PER_CLASS, classification.BATCH


@dataclass(frozen=True)
class Config(classification.Config):
    scheme: str = "mutual"
    large: bool = False

    @property
    def steps(self) -> int:
        teacher = self.teacher_epochs * -(-classification.TEACHER_IMAGES // classification.TEACHER_BATCH)
        return teacher + 2 * self.students


@dataclass
class Problem:
    """What a way of training gets: few labelled images, all images, a teacher, and a loop that is the same for all."""

    config: Config
    seed: int
    device: torch.device
    images: torch.Tensor
    labels: torch.Tensor
    unlabelled: torch.Tensor
    teacher: nn.Module

    def student(self, make: Callable[[], nn.Module] = models.student, other: int = 0) -> nn.Module:
        return models.seeded(make, self.seed + 500 * other, self.device)

    def fit(
        self,
        modules: Sequence[nn.Module],
        loss: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
        after_step: Callable[[], None] = lambda: None,
        after_epoch: Callable[[], None] = lambda: None,
    ) -> None:
        """Trains all modules together on loss(images, labels, epoch)."""
        optimizer = torch.optim.SGD([p for m in modules for p in m.parameters()], 0.05, momentum=0.9)
        order, last = torch.Generator().manual_seed(self.seed), 0
        for epoch, indices in data.batches(len(self.labels), BATCH, self.config.epochs, order):
            if epoch != last:
                after_epoch()
                last = epoch
            optimizer.zero_grad()
            loss(self.images[indices], self.labels[indices], epoch).backward()
            optimizer.step()
            after_step()

    def distill(self, student: nn.Module, teachers: Sequence[nn.Module], temperature: float = 4.0) -> None:
        """Labels, and where there are teachers their average too."""

        def loss(x: torch.Tensor, y: torch.Tensor, epoch: int) -> torch.Tensor:
            if not teachers:
                return F.cross_entropy(student(x), y)
            target = schemes.average_logits(teachers, x)
            return kdkernels.distillation_loss(student(x), target, y, temperature, 0.9, backend=self.config.backend)

        self.fit([student], loss)


def mutual(p: Problem) -> nn.Module:
    peers = [p.student(), p.student(other=1)]
    p.fit(peers, lambda x, y, epoch: schemes.mutual_learning_loss([m(x) for m in peers], y, backend=p.config.backend))
    return peers[0]


def online(p: Problem) -> nn.Module:
    large, small = p.student(models.teacher, 1), p.student()
    p.fit([large, small], lambda x, y, epoch: schemes.collaborative_loss(
        [large(x), small(x)], y, influence=[[0, 0.1], [1, 0]], temperature=2.0, backend=p.config.backend))  # fmt: skip
    return small


def ema(p: Problem) -> nn.Module:
    """Mean teacher: the student's answer to a noisy image without a label is its average's to another such image."""
    student = p.student()
    teacher, noise = schemes.EMATeacher(student, 0.99), torch.Generator().manual_seed(p.seed)
    weight = schemes.Linear(0.0, 3.0, max(p.config.epochs // 4, 1))

    def noisy(x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * torch.randn(x.shape, generator=noise).to(x.device)

    def loss(x: torch.Tensor, y: torch.Tensor, epoch: int) -> torch.Tensor:
        more = p.unlabelled[torch.randint(len(p.unlabelled), (64,), generator=noise)]
        consistency = kdkernels.kl_div(student(noisy(more)), teacher(noisy(more)), backend=p.config.backend)
        return F.cross_entropy(student(x), y) + weight(epoch) * consistency

    p.fit([student], loss, after_step=lambda: teacher.update(student))
    return teacher.model


def auxiliary_heads(p: Problem) -> nn.Module:
    model = p.student(branches)
    p.fit([model], lambda x, y, epoch: schemes.self_distillation_loss(model(x), y, backend=p.config.backend))
    return Deepest(model)


def branches(width: int = 16) -> nn.Module:
    stages = [
        nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh()),
        nn.Sequential(nn.Linear(width, width), nn.Tanh()),
    ]
    return schemes.EarlyExitNetwork(stages, [nn.Linear(width, data.CLASSES) for _ in stages])


class Deepest(nn.Module):
    """The deepest head of a network with several."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)[-1]


def born_again(p: Problem) -> nn.Module:
    seeds = iter(range(3))
    return schemes.born_again(lambda: p.student(other=2 - next(seeds)), 3, p.distill)[-1]


def assistant(p: Problem) -> nn.Module:
    chain = [p.student(models.convolutional_student, 1), p.student()]
    return schemes.distill_chain(chain, p.distill, teacher=p.teacher)[-1]


def earlier_epoch(p: Problem) -> nn.Module:
    student = p.student()
    teacher, alpha = schemes.SnapshotTeacher(student), schemes.Linear(0.0, 0.8, p.config.epochs)
    p.fit([student], lambda x, y, epoch: kdkernels.distillation_loss(
        student(x), teacher(x), y, 1.0, alpha(epoch), backend=p.config.backend),
        after_epoch=lambda: teacher.update(student))  # fmt: skip
    return student


def annealed(p: Problem) -> nn.Module:
    student, temperature = p.student(), schemes.Cosine(8.0, 1.0, p.config.epochs)

    def loss(x: torch.Tensor, y: torch.Tensor, epoch: int) -> torch.Tensor:
        with torch.no_grad():
            target = p.teacher(x)
        return kdkernels.distillation_loss(student(x), target, y, temperature(epoch), 0.9, backend=p.config.backend)

    p.fit([student], loss)
    return student


# By name: the way of training, and the student that labels alone are compared on.
SCHEMES: dict[str, tuple[Callable[[Problem], nn.Module], Callable[[], nn.Module]]] = {
    "mutual": (mutual, models.student),
    "online": (online, models.student),
    "ema": (ema, models.student),
    "auxiliary-heads": (auxiliary_heads, lambda: Deepest(branches())),
    "born-again": (born_again, models.student),
    "assistant": (assistant, models.student),
    "earlier-epoch": (earlier_epoch, models.student),
    "annealed": (annealed, models.student),
}


@dataclass
class Outcome:
    """Held-out accuracy in percent, of every student both ways; the teacher's, and what ran the losses."""

    config: Config
    backend: str
    teacher: float
    alone: list[float] = field(default_factory=list)
    with_scheme: list[float] = field(default_factory=list)


def run(config: Config, bar: Reporter) -> Outcome:
    """Trains a teacher, which only some schemes ask, then every student both ways from the same weights."""
    device = config.torch_device()
    backend = backends.resolve("distillation_loss", (torch.empty(0, device=device),), config.backend)
    way, make = SCHEMES[config.scheme]
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False), classification.one_thread():
        digits = data.digits(config.seed, classification.HELD_OUT).to(device)
        test = functools.partial(accuracy, images=digits.test_images, labels=digits.test_labels)
        teacher = classification.trained_teacher(config, digits, device, bar)
        outcome = Outcome(config, classification.described(backend), test(teacher))
        for k in range(config.students):
            bar.step(f"student {k + 1} of {config.students}")
            seed = 1000 * (config.seed + 1) + k
            seen = data.few_of_each(digits.labels.cpu(), IMAGES_PER_CLASS, torch.Generator().manual_seed(seed)).to(
                device
            )
            problem = Problem(config, seed, device, digits.images[seen], digits.labels[seen], digits.images, teacher)
            student = problem.student(make)
            problem.distill(student, ())
            outcome.alone.append(test(student))
            bar.advance()
            outcome.with_scheme.append(test(way(problem)))
            bar.advance()
    return outcome


def show(outcome: Outcome) -> None:
    """Accuracy without and with, and the gain student by student, whatever it is."""
    config = outcome.config
    gains = [x - y for x, y in zip(outcome.with_scheme, outcome.alone, strict=True)]
    spread = f"mean ± standard deviation of {config.students} students" if config.students > 1 else "one student"
    print_table(
        f"Handwritten digits: held-out accuracy in percent, {spread}",
        ("model", "accuracy", "gain"),
        [
            ("teacher with all labels", f"{outcome.teacher:.1f}", ""),
            ("student, labels alone", mean(outcome.alone), ""),
            (f"student, {config.scheme}", mean(outcome.with_scheme), mean(gains, "+")),
        ],
    )
    print(f"Backend: {outcome.backend}")
    print(
        f"\nA student sees {IMAGES_PER_CLASS * data.CLASSES} labels; both ways start from the same weights and see them in the same"
        f" order.\nRead a gain against its spread. The numbers come again with --seed {config.seed}."
    )
