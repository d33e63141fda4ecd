"""A student with few labels, alone and with a teacher's relations between images, which need no labels.

The relational loss is between a middle layer of the student and one of the teacher, on images of which the student
sees no label. Accuracy is the classifier's, and that of the middle layer by its nearest neighbours.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

import kdkernels
from kdkernels import backends
from kdkernels.console import print_table
from kdkernels.demo import classification, data, models
from kdkernels.demo.report import gains, mean, of_students, speed
from kdkernels.demo.train import Run, accuracy, train, wait
from kdkernels.ops.registry import specs

if TYPE_CHECKING:
    from kdkernels.console import Reporter

BATCH, UNLABELLED, NEIGHBOURS = 50, 64, 5
ALONE, PLAIN, FUSED = "labels alone", "plain PyTorch", "kdkernels"
FeatureLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (student's features, teacher's) -> a scalar


class Relation(NamedTuple):
    """A loss that the demo knows: the public function, its place in the models, and its weight beside the labels."""

    function: str
    place: str
    weight: float


RELATIONS = {
    "rkd": Relation("rkd_loss", "embedding", 10.0),
    "sp": Relation("similarity_preserving_loss", "embedding", 1000.0),
    "cc": Relation("correlation_congruence_loss", "embedding", 50.0),
    "pkt": Relation("pkt_loss", "embedding", 1e4),
    "graph": Relation("graph_structure_loss", "embedding", 1.0),
    "gram": Relation("gram_loss", "map", 1000.0),
    "nst": Relation("nst_loss", "map", 100.0),
    "at": Relation("attention_transfer_loss", "map", 3000.0),
    "channel-at": Relation("channel_attention_transfer_loss", "map", 30.0),
    "hint": Relation("hint_loss", "map", 0.3),
    "pkd": Relation("pearson_feature_loss", "map", 10.0),
}
FEATURES = ("at", "channel-at", "hint", "pkd")


@dataclass(frozen=True)
class Config(classification.Config):
    loss: str = "rkd"
    weight: float | None = None
    large: bool = False

    @property
    def relation(self) -> Relation:
        relation = RELATIONS[self.loss]
        return relation if self.weight is None else relation._replace(weight=self.weight)


@dataclass
class Pupil(Run):
    """A student that also learns from relations, on a draw of unlabelled images in every step."""

    relation: FeatureLoss | None = None
    weight: float = 0.0
    place: str = "embedding"
    images: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    targets: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    generator: torch.Generator = field(default_factory=torch.Generator)

    def step(self, images: torch.Tensor, _: torch.Tensor, labels: torch.Tensor) -> None:
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        value = loss.item()
        if self.relation is not None:
            chosen = torch.randint(len(self.images), (UNLABELLED,), generator=self.generator).to(self.images.device)
            features = models.features(self.model, self.place, self.images[chosen])
            leaf, targets = features.detach().requires_grad_(), self.targets[chosen]
            wait(leaf)
            start = time.perf_counter()
            relation = self.relation(leaf, targets)
            relation.backward()
            wait(leaf)
            self.seconds.append(time.perf_counter() - start)
            features.backward(self.weight * leaf.grad)
            value += self.weight * relation.item()
        self.optimizer.step()
        self.losses.append(value)


@dataclass
class Outcome:
    """What the demo found: for each way of training, one finished run and one kNN accuracy a student."""

    config: Config
    device: torch.device
    backend: str
    teacher_accuracy: float
    teacher_neighbours: float
    images: tuple[int, int, int]  # the teacher's, a student's, held out
    runs: dict[str, list[Pupil]] = field(default_factory=dict)
    neighbours: dict[str, list[float]] = field(default_factory=dict)

    def difference(self) -> float:
        """The largest difference between the two loss curves, relative to the loss there."""
        pairs = zip(self.runs[PLAIN], self.runs[FUSED], strict=True)
        return max(abs(x - y) / max(abs(x), 1e-30) for a, b in pairs for x, y in zip(a.losses, b.losses, strict=True))


@torch.no_grad()
def neighbours_accuracy(
    gallery: torch.Tensor, gallery_labels: torch.Tensor, queries: torch.Tensor, labels: torch.Tensor
) -> float:
    """In percent: the commonest label among a query's nearest neighbours, by cosine; the nearest of equals counts."""
    similarity = F.normalize(queries.flatten(1)) @ F.normalize(gallery.flatten(1)).t()
    near = gallery_labels[similarity.topk(min(NEIGHBOURS, len(gallery_labels)), 1).indices]
    votes = (near[:, :, None] == near[:, None]).sum(2)
    return 100.0 * (near.gather(1, votes.argmax(1, keepdim=True))[:, 0] == labels).float().mean().item()


def ways_of(name: str, backend: str) -> dict[str, FeatureLoss | None]:
    """Nothing, the lines that people write, and these kernels: both from the registry, with the same options."""
    function = getattr(kdkernels, RELATIONS[name].function)
    case = next(c for spec in specs() for c in spec.cases if c.function is function and c.eager)

    def plain(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        assert case.eager is not None
        return case.eager(**dict(zip(case.grads, (student, teacher))), **case.options)

    def fused(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return function(student, teacher, **case.options, backend=backend)

    return {ALONE: None, PLAIN: plain, FUSED: fused}


def run(config: Config, bar: Reporter) -> Outcome:
    """Trains a teacher, then every student three ways."""
    device, relation = config.torch_device(), config.relation
    backend = backends.resolve(relation.function, (torch.empty(0, device=device),), config.backend)
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False), classification.one_thread():
        digits = data.digits(config.seed, classification.HELD_OUT).to(device)
        test = digits.test_images, digits.test_labels
        teacher = classification.trained_teacher(config, digits, device, bar)
        with torch.no_grad():
            targets = models.features(teacher, relation.place, digits.images)
            embedded = [models.features(teacher, "embedding", x) for x in (digits.images, digits.test_images)]
        outcome = Outcome(
            config, device, classification.described(backend), accuracy(teacher, *test),
            neighbours_accuracy(embedded[0], digits.labels, embedded[1], digits.test_labels),
            (len(digits.labels), classification.IMAGES_PER_CLASS * data.CLASSES, len(digits.test_labels)),
        )  # fmt: skip
        ways = ways_of(config.loss, config.backend)
        for k in range(config.students):
            bar.step(f"student {k + 1} of {config.students}")
            _train_student(config, outcome, digits, targets, ways, k, bar)
    return outcome


def enrolled(
    name: str, loss: FeatureLoss | None, relation: Relation, digits: data.Digits, targets: torch.Tensor, seed: int
) -> Pupil:
    """A student as it begins."""
    student = models.seeded(models.convolutional_student, seed, digits.images.device)
    return Pupil(
        name, student, classification.labels_alone, torch.optim.Adam(student.parameters(), 5e-3), relation=loss,
        weight=relation.weight, place=relation.place, images=digits.images, targets=targets,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def _train_student(
    config: Config, outcome: Outcome, digits: data.Digits, targets: torch.Tensor,
    ways: dict[str, FeatureLoss | None], k: int, bar: Reporter,
) -> None:  # fmt: skip
    device = outcome.device
    seed = config.student_seed(k)
    order = torch.Generator().manual_seed(seed)
    seen = data.few_of_each(digits.labels.cpu(), classification.IMAGES_PER_CLASS, order).to(device)
    pupils = [enrolled(name, loss, config.relation, digits, targets, seed) for name, loss in ways.items()]
    for pupil in pupils:
        outcome.runs.setdefault(pupil.name, []).append(pupil)
    images, labels = digits.images[seen], digits.labels[seen]
    train(
        pupils, images, torch.zeros(len(seen), 1, device=device), labels,
        data.batches(len(seen), BATCH, config.epochs, order), (digits.test_images, digits.test_labels), bar.advance,
    )  # fmt: skip
    with torch.no_grad():
        for pupil in pupils:
            near = [models.features(pupil.model, "embedding", x) for x in (images, digits.test_images)]
            found = neighbours_accuracy(near[0], labels, near[1], digits.test_labels)
            outcome.neighbours.setdefault(pupil.name, []).append(found)


def show(outcome: Outcome) -> None:
    """Accuracy of everybody, with and without the loss; then the two implementations against each other."""
    config, relation = outcome.config, outcome.config.relation
    many, few, held_out = outcome.images
    rows = [("teacher", f"{outcome.teacher_accuracy:.1f}", "", f"{outcome.teacher_neighbours:.1f}", "")]
    final = {name: [run.accuracy[-1] for run in runs] for name, runs in outcome.runs.items()}
    for name in outcome.runs:
        cells = []
        for group in (final, outcome.neighbours):
            cells += [mean(group[name]), "" if name == ALONE else mean(gains(group[name], group[ALONE]), "+")]
        label = name if name == ALONE else f"labels + {relation.function}, {name}"
        rows.append((f"student, {label}", *cells))
    print_table(
        f"Handwritten digits: accuracy in percent on {held_out} held-out images, {of_students(config.students)}",
        ("model", "classifier", "gain", f"{NEIGHBOURS} nearest neighbours", "gain"),
        rows,
    )
    one, other = ([s for run in outcome.runs[way] for s in run.seconds] for way in (PLAIN, FUSED))
    print_table(
        f"Time in the loss, with its gradient down to the {relation.place}, on {outcome.device}",
        ("what", "plain PyTorch", "kdkernels", "ratio"),
        [speed(f"{UNLABELLED} images (median of {len(one)})", statistics.median(one), statistics.median(other))],
    )
    print(f"Largest difference between the two loss curves: {outcome.difference():.1e} of the loss there")
    print(f"Backend: {outcome.backend}")
    print(
        f"\nThe teacher saw {many} labelled images and a student {few} of them. {relation.function} (weight {relation.weight:g}) is"
        f"\nbetween their {relation.place}s, on {UNLABELLED} of all those images in each step, without labels. The three ways share"
        "\ninitial weights, images and batch order. Times vary; every other number comes again with "
        f"--seed {config.seed}."
    )


def plot(outcome: Outcome, path: Path) -> None:
    """Accuracy by epoch, and the loss of the first student."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, group), style in zip(outcome.runs.items(), (":", "-", "--")):
        by_epoch = list(zip(*(run.accuracy for run in group), strict=True))
        left.plot(range(1, len(by_epoch) + 1), [statistics.mean(x) for x in by_epoch], style, label=name)
        if name != ALONE:
            right.plot(group[0].losses, style, label=name)
    left.axhline(outcome.teacher_accuracy, c="black", lw=1, label="teacher")
    left.set(
        xlabel="epoch", ylabel="held-out accuracy, %", title=f"With and without {outcome.config.relation.function}"
    )
    right.set(xlabel="step", ylabel="loss", title="Loss of the first student", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
