"""Every scheme, and every loss that digits or text can show, in one table: what a student gains, or not.

A loss is between a student's scores, embedding or map and the teacher's on images without labels, beside the labels of a
few; a student is the same with every loss. Weights are round numbers that nobody has tuned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import kdkernels
from kdkernels import backends
from kdkernels.console import print_table
from kdkernels.demo import classification, data, language, models
from kdkernels.demo.relations import BATCH, RELATIONS, UNLABELLED, Relation, enrolled
from kdkernels.demo.report import Comparison, of_students
from kdkernels.demo.schemes import OF_TEXT, Class
from kdkernels.demo.schemes import Config as SchemeConfig
from kdkernels.demo.train import train
from kdkernels.demo.ways import WAYS

if TYPE_CHECKING:
    from kdkernels.console import Reporter

T = {"temperature": 4.0}
# By the name of the public function: its place in the models, its weight beside the labels, and its options.
LOSSES: dict[str, tuple[Relation, dict[str, Any]]] = {
    **{
        name: (Relation(name, "scores", 1.0), options)
        for name, options in {
            "kl_div": T, "reverse_kl_div": T, "symmetric_kl_div": T, "js_div": T, "generalized_js_div": T,
            "skew_kl_div": T, "skew_reverse_kl_div": T, "total_variation": T, "alpha_beta_div": T,
            "soft_cross_entropy": T, "decoupled_kd_loss": T, "dist_loss": T, "lwf_loss": {}, "topk_div": T,
            "uld_loss": T, "cosine_loss": {}, "margin_ranking_loss": {}, "margin_mse_loss": {}, "info_nce_distillation_loss": {}, "seed_loss": {}, "compress_loss": {},
        }.items()
    },
    **{relation.function: (relation, {}) for relation in RELATIONS.values()},
    "rkd_distance_loss": (Relation("rkd_distance_loss", "embedding", 10.0), {}),
    "rkd_angle_loss": (Relation("rkd_angle_loss", "embedding", 20.0), {}),
    "hard_dark_rank_loss": (Relation("hard_dark_rank_loss", "embedding", 0.1), {"normalize": True}),
    "cosine_similarity_matrix_loss": (Relation("cosine_similarity_matrix_loss", "embedding", 10.0), {}),
    "global_structure_loss": (Relation("global_structure_loss", "embedding", 10.0), {"kernel": "rbf"}),
    "local_structure_loss": (Relation("local_structure_loss", "embedding", 10.0), {"kernel": "linear", "normalize": True}),
    "instance_relation_graph_loss": (Relation("instance_relation_graph_loss", "embedding", 1.0), {}),
    "ickd_loss": (Relation("ickd_loss", "map", 10.0), {}),
    "hierarchical_context_loss": (Relation("hierarchical_context_loss", "map", 0.3), {}),
    "channel_wise_div": (Relation("channel_wise_div", "map", 1.0), T),
    "pixel_wise_div": (Relation("pixel_wise_div", "map", 1.0), T),
    "pairwise_structure_loss": (Relation("pairwise_structure_loss", "map", 10.0), {"pool": None}),
    "cross_image_relation_loss": (Relation("cross_image_relation_loss", "map", 1.0), {}),
}  # fmt: skip
# Of the public losses, those that this table has in another form or not at all.
ELSEWHERE = {
    "what --loss kd is about": ("distillation_loss",),
    "parts of schemes": ("mutual_kl_div", "auxiliary_heads_loss"),
    "from heads and of text, see --task lm": (
        "linear_distillation_loss", "linear_generalized_js_div", "linear_js_div", "linear_kl_div", "linear_reverse_kl_div",
        "linear_sequence_loss", "linear_topk_div", "sequence_loss",
    ),
    "want boxes": ("detection_distillation_loss", "fgd_loss", "rank_mimicking_loss"),
    "want two maps, a learnt variance, a bank of all samples": ("fsp_loss", "variational_information_loss", "crd_loss"),
}  # fmt: skip


@dataclass(frozen=True)
class Config(classification.Config):
    students: int = 3
    large: bool = False
    minutes: float = 15.0  # no row is begun after

    def of_text(self) -> language.Config:
        shared = {f: getattr(self, f) for f in ("seed", "epochs", "teacher_epochs", "backend", "device")}
        return SchemeConfig(**shared).text()

    @property
    def steps(self) -> int:
        text = self.of_text()
        of_text = text.teacher_steps + self.students * (text.start_steps + (1 + len(OF_TEXT)) * text.more_steps)
        return self.teacher_steps + self.students * (1 + len(LOSSES) + len(WAYS)) + of_text


@dataclass
class Outcome:
    config: Config
    backend: str
    teachers: tuple[float, float]  # accuracy of digits, perplexity of text
    rows: list[Comparison]


def loss_of(name: str, options: dict[str, Any], queue: torch.Tensor, backend: str) -> Callable[..., torch.Tensor]:
    """The loss of (student's, teacher's); what else one needs is made of the teacher's."""
    function = getattr(kdkernels, name)
    options = {**options, "backend": backend}

    def loss(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        more: Sequence[Any] = (t,)
        if name == "decoupled_kd_loss":
            more = (t, t.argmax(1))
        elif name == "margin_ranking_loss":
            more = (t.argmax(1),)
        elif name == "margin_mse_loss":  # what the teacher thinks of, and what it thinks of next
            first, second = t.topk(2).indices.unbind(1)
            s, *more = (x.gather(1, at[:, None])[:, 0] for x in (s, t) for at in (first, second))
        elif name == "topk_div":
            more = tuple(t.topk(3))
        elif name in ("seed_loss", "compress_loss"):
            more = (t, queue)
        elif name == "local_structure_loss":  # each image's nearest in the teacher's eyes
            near = (-torch.cdist(t, t)).fill_diagonal_(-torch.inf).topk(5).indices
            more = (t, torch.stack([near.flatten(), torch.arange(len(t), device=t.device).repeat_interleave(5)]))
        return function(s, *more, **options)

    return loss


def run(config: Config, bar: Reporter) -> Outcome:
    backend = backends.resolve("distillation_loss", (torch.empty(0, device=config.torch_device()),), config.backend)
    until = time.monotonic() + 60 * config.minutes
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False), classification.one_thread():
        pupils = Class(config, bar)
        rows = [*_losses(config, pupils, bar, until), *_schemes(config, pupils, bar, until)]
        teacher, of_text = _text(config, bar, until)
    return Outcome(config, classification.described(backend), (pupils.test(pupils.teacher), teacher), [*rows, *of_text])


def _losses(config: Config, pupils: Class, bar: Reporter, until: float) -> Iterator[Comparison]:
    digits = pupils.digits
    test = digits.test_images, digits.test_labels
    nothing = torch.zeros(len(digits.labels), 1, device=pupils.device)
    with torch.no_grad():
        targets = {
            place: models.features(pupils.teacher, place, digits.images) for place in ("scores", "embedding", "map")
        }
    queue = torch.nn.functional.normalize(targets["scores"][:256], dim=1)

    def trained(loss: Callable[..., torch.Tensor] | None, relation: Relation) -> list[float]:
        found = []
        for k in range(config.students):
            seed = config.student_seed(k)
            order = torch.Generator().manual_seed(seed)
            seen = data.few_of_each(digits.labels.cpu(), classification.IMAGES_PER_CLASS, order).to(pupils.device)
            pupil = enrolled(relation.function, loss, relation, digits, targets[relation.place], seed)
            batches = data.batches(len(seen), BATCH, config.epochs, order)
            train([pupil], digits.images[seen], nothing[seen], digits.labels[seen], batches, test)
            found.append(pupil.accuracy[-1])
            bar.advance()
        return found

    bar.step("labels alone")
    alone = trained(None, Relation("labels alone", "scores", 0.0))
    for name, (relation, options) in LOSSES.items():
        row = Comparison("loss", f"{name}, {relation.place}", "labels alone")
        if time.monotonic() < until:
            bar.step(name)
            row.alone, row.found = alone, trained(loss_of(name, options, queue, config.backend), relation)
        yield row


def _schemes(config: Config, pupils: Class, bar: Reporter, until: float) -> Iterator[Comparison]:
    known: dict[Any, list[float]] = {}
    for name, way in WAYS.items():
        row = Comparison("scheme", name, way.other)
        if time.monotonic() < until:
            bar.step(name)
            compared = (way.make, way.without)
            if compared not in known:
                known[compared] = [pupils.test(way.alone(pupils.problem(k)), way.test) for k in range(config.students)]
            row.alone = known[compared]
            for k in range(config.students):
                row.found.append(pupils.test(way.train(pupils.problem(k)), way.test))
                bar.advance()
        yield row


def _text(config: Config, bar: Reporter, until: float) -> tuple[float, list[Comparison]]:
    rows = {way: Comparison("text", scheme, "its text alone") for scheme, way in OF_TEXT.items()}
    if time.monotonic() >= until:
        return float("nan"), list(rows.values())
    lesson = language.Lesson(config.of_text(), bar)
    for k in range(config.students):
        bar.step("text")
        first = lesson.begun(config.student_seed(k))
        written = lesson.written()
        alone = lesson.further(first, language.ALONE, written)
        for way, row in rows.items():
            row.alone.append(alone)
            row.found.append(lesson.further(first, way, written))
    return lesson.perplexity(lesson.teacher), list(rows.values())


def show(outcome: Outcome) -> None:
    """One table; the gains as they are."""
    config = outcome.config
    print_table(
        f"Held-out accuracy in percent on digits, perplexity (lower is better) on text; {of_students(config.students)}",
        ("kind", "what", "compared with", "without", "with", "gain"),
        [(row.kind, row.name, row.other, *row.cells()) for row in outcome.rows],
    )
    print(f"Teachers: {outcome.teachers[0]:.1f} percent; perplexity {outcome.teachers[1]:.2f}")
    print(f"Backend: {outcome.backend}")
    print(
        f"\nStudents train for {config.epochs} epochs. A loss is on {UNLABELLED} images without labels in each step, beside"
        f"\n{classification.IMAGES_PER_CLASS * data.CLASSES} labels; its weight is a round number that nobody has tuned, and a loss without a gain here may"
        "\nhave one elsewhere. Schemes have another, smaller student. A gain is positive where the student is better; read it"
        f"\nagainst its spread. The numbers come again with --seed {config.seed}. Not shown:"
        + "".join(f"\n  {', '.join(names)}: {why};" for why, names in ELSEWHERE.items())
    )
