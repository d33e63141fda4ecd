"""Ways of training a student with few labels, one for each piece of kdkernels.schemes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

import kdkernels
from kdkernels import schemes
from kdkernels.demo import classification, data, models
from kdkernels.demo.train import accuracy

if TYPE_CHECKING:
    from kdkernels.demo.schemes import Config


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

    def of(self, chosen: torch.Tensor) -> Problem:
        """With some of the labelled images only."""
        return dataclasses.replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def drawn(self, generator: torch.Generator) -> torch.Tensor:
        """Unlabelled images."""
        return self.unlabelled[torch.randint(len(self.unlabelled), (64,), generator=generator).to(self.device)]

    @torch.no_grad()
    def taught(self, x: torch.Tensor) -> torch.Tensor:
        return self.teacher(x)

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
        for epoch, indices in data.batches(len(self.labels), classification.BATCH, self.config.epochs, order):
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
        more = p.drawn(noise)
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

    p.fit([student], lambda x, y, epoch: kdkernels.distillation_loss(
        student(x), p.taught(x), y, temperature(epoch), 0.9, backend=p.config.backend))  # fmt: skip
    return student


def by_capacity(p: Problem) -> nn.Module:
    """As soft at first as the gap between the models asks."""
    student = p.student()
    temperature = schemes.Linear(schemes.by_capacity(student, p.teacher, 2.0, 8.0), 1.0, p.config.epochs)
    p.fit([student], lambda x, y, epoch: kdkernels.distillation_loss(
        student(x), p.taught(x), y, temperature(epoch), 0.9, backend=p.config.backend))  # fmt: skip
    return student


def by_confidence(p: Problem) -> nn.Module:
    """The teacher counts as far as it is right."""
    student = p.student()

    def loss(x: torch.Tensor, y: torch.Tensor, epoch: int) -> torch.Tensor:
        target = p.taught(x)
        weight = schemes.confidence_weight(target, y, temperature=4.0)
        soft = kdkernels.kl_div(student(x), target, temperature=4.0, weight=weight, backend=p.config.backend)
        return 0.1 * F.cross_entropy(student(x), y) + 0.9 * soft

    p.fit([student], loss)
    return student


def learnable_temperature(p: Problem) -> nn.Module:
    """The temperature is trained against the student (CTKD)."""
    student, temperature = p.student(), schemes.LearnableTemperature().to(p.device)
    strength = schemes.Cosine(0.0, 1.0, max(p.config.epochs // 2, 1))

    def loss(x: torch.Tensor, y: torch.Tensor, epoch: int) -> torch.Tensor:
        soft = kdkernels.kl_div(
            student(x), p.taught(x), temperature=temperature(strength(epoch)), backend=p.config.backend
        )
        return 0.1 * F.cross_entropy(student(x), y) + 0.9 * soft

    p.fit([student, temperature], loss)
    return student


def ensemble(p: Problem) -> nn.Module:
    """Three learn from the one of them that is right, row by row."""
    peers = [p.student(other=k) for k in range(3)]

    def loss(x: torch.Tensor, y: torch.Tensor, epoch: int) -> torch.Tensor:
        scores = [m(x) for m in peers]
        best = schemes.ensemble_logits(scores, y, how="best")
        terms = [kdkernels.distillation_loss(z, best, y, 2.0, 0.5, backend=p.config.backend) for z in scores]
        return torch.stack(terms).sum()

    p.fit(peers, loss)
    return peers[0]


def temporal(p: Problem) -> nn.Module:
    """A student's own earlier answers to images without labels."""
    student, generator = p.student(), torch.Generator().manual_seed(p.seed)
    table = schemes.TemporalEnsemble(len(p.unlabelled), data.CLASSES).to(p.device)
    weight = schemes.Linear(0.0, 3.0, max(p.config.epochs // 4, 1))

    def loss(x: torch.Tensor, y: torch.Tensor, epoch: int) -> torch.Tensor:
        chosen = torch.randperm(len(p.unlabelled), generator=generator)[:64].to(p.device)
        scores = student(p.unlabelled[chosen])
        consistency = kdkernels.kl_div(
            scores, table(chosen), weight=table.seen(chosen), num_items=len(chosen), backend=p.config.backend
        )
        table.update(chosen, scores.detach())
        return F.cross_entropy(student(x), y) + weight(epoch) * consistency

    p.fit([student], loss)
    return student


def semi_supervised(p: Problem) -> nn.Module:
    """The teacher on images without labels, beside those with."""
    student, generator = p.student(), torch.Generator().manual_seed(p.seed)

    def loss(x: torch.Tensor, y: torch.Tensor, epoch: int) -> torch.Tensor:
        more = p.drawn(generator)
        x, y = torch.cat([x, more]), torch.cat([y, y.new_full((len(more),), -100)])
        return schemes.semi_supervised_loss(
            student(x), p.taught(x), y, temperature=4.0, threshold=0.5, backend=p.config.backend
        )

    p.fit([student], loss)
    return student


def synthetic(p: Problem) -> nn.Module:
    """The teacher on images that it has made itself, from noise."""
    student, generator = p.student(), torch.Generator().manual_seed(p.seed)
    noise = torch.rand(256, *p.images.shape[1:], generator=generator).to(p.device)
    wanted = torch.arange(len(noise), device=p.device) % data.CLASSES
    made = schemes.synthetic_batch(p.teacher, noise, wanted, steps=p.config.epochs, smoothness=1.0, bounds=(0.0, 1.0))

    def loss(x: torch.Tensor, y: torch.Tensor, epoch: int) -> torch.Tensor:
        more = made[torch.randint(len(made), (64,), generator=generator).to(p.device)]
        soft = kdkernels.kl_div(student(more), p.taught(more), temperature=4.0, backend=p.config.backend)
        return F.cross_entropy(student(x), y) + soft

    p.fit([student], loss)
    return student


class Leaving(nn.Module):
    """A network with early exits, which each image leaves at the first head that is sure."""

    def __init__(self, model: schemes.EarlyExitNetwork, threshold: float):
        super().__init__()
        self.model, self.threshold = model.eval(), threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.infer(x, self.threshold)[0]


def early_exit(p: Problem) -> nn.Module:
    model = p.student(branches)
    assert isinstance(model, schemes.EarlyExitNetwork)
    p.fit([model], lambda x, y, epoch: schemes.self_distillation_loss(model(x), y, backend=p.config.backend))
    return Leaving(model, 0.9)


# ----------------------------------------------------------------------------------- two tasks, digits to 4 and from 5 on

LATER = data.CLASSES // 2


class Tasks(nn.Module):
    """A student's scores, the tasks apart."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        scores = self.model(x)
        return {0: scores[:, :LATER], 1: scores[:, LATER:]}


def by_task(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Accuracy in percent where it is known which task a digit is of."""

    def scores(x: torch.Tensor) -> torch.Tensor:
        of_task = torch.arange(data.CLASSES, device=x.device) // LATER == (labels // LATER)[:, None]
        return model(x).masked_fill(~of_task, -torch.inf)

    return accuracy(scores, images, labels)  # type: ignore[arg-type]


def one_task_after_the_other(p: Problem, memory: schemes.LearningWithoutForgetting | None) -> nn.Module:
    student = p.student()
    tasks = Tasks(student)
    for task in range(2):

        def loss(x: torch.Tensor, y: torch.Tensor, epoch: int, task: int = task) -> torch.Tensor:
            out = tasks(x)
            kept = 0.0 if memory is None else memory(out, x)
            return F.cross_entropy(out[task], y - task * LATER) + kept

        p.of(p.labels // LATER == task).fit([student], loss)
        if memory is not None:
            memory.remember(tasks, task)
    return student


def lwf(p: Problem) -> nn.Module:
    return one_task_after_the_other(p, schemes.LearningWithoutForgetting(backend=p.config.backend))


def all_and_then_some(p: Problem, anchor_weight: float) -> nn.Module:
    """All digits first; then those from 5 on again, held to what was known by an anchor."""
    student = p.student()
    p.distill(student, ())
    anchor = schemes.SnapshotTeacher(student)

    def loss(x: torch.Tensor, y: torch.Tensor, epoch: int) -> torch.Tensor:
        scores = student(x)
        held = schemes.anchor_distillation_loss(scores, anchor(x), anchor_weight=0.8, backend=p.config.backend)
        return F.cross_entropy(scores, y) + anchor_weight * held

    p.of(p.labels >= LATER).fit([student], loss)
    return student


def anchor(p: Problem) -> nn.Module:
    return all_and_then_some(p, 5.0)


# --------------------------------------------------------------------------------------------------------------- by name


def labels_alone(p: Problem, make: Callable[[], nn.Module]) -> nn.Module:
    student = p.student(make)
    p.distill(student, ())
    return student


@dataclass(frozen=True)
class Way:
    """A way of training, what it is compared with, and how."""

    train: Callable[[Problem], nn.Module]
    make: Callable[[], nn.Module] = models.student
    without: Callable[[Problem], nn.Module] | None = None  # default: what `make` makes learns from labels alone
    other: str = "labels alone"
    test: Callable[[nn.Module, torch.Tensor, torch.Tensor], float] = accuracy

    def alone(self, p: Problem) -> nn.Module:
        return labels_alone(p, self.make) if self.without is None else self.without(p)


def deepest() -> nn.Module:
    return Deepest(branches())


WAYS: dict[str, Way] = {
    "mutual": Way(mutual),
    "online": Way(online),
    "ensemble": Way(ensemble),
    "ema": Way(ema),
    "temporal": Way(temporal),
    "earlier-epoch": Way(earlier_epoch),
    "auxiliary-heads": Way(auxiliary_heads, deepest),
    "early-exit": Way(early_exit, deepest),
    "born-again": Way(born_again),
    "assistant": Way(assistant),
    "annealed": Way(annealed),
    "capacity": Way(by_capacity),
    "confidence": Way(by_confidence),
    "learnable-temperature": Way(learnable_temperature),
    "semi-supervised": Way(semi_supervised),
    "synthetic": Way(synthetic),
    "lwf": Way(
        lwf, without=lambda p: one_task_after_the_other(p, None), other="two tasks in turn, no memory", test=by_task
    ),
    "anchor": Way(anchor, without=lambda p: all_and_then_some(p, 0.0), other="some classes again, no anchor"),
}
