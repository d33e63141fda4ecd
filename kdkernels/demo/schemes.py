"""A student with few labels, trained as one of kdkernels.schemes has it and by labels alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from kdkernels import backends
from kdkernels.console import print_table
from kdkernels.demo import classification, data, language
from kdkernels.demo.report import Comparison, of_students
from kdkernels.demo.train import accuracy
from kdkernels.demo.ways import WAYS, Problem

if TYPE_CHECKING:
    from kdkernels.console import Reporter

OF_TEXT = {"sequence": language.SEQUENCES, "on-policy": language.ON_POLICY}
SCHEMES = (*WAYS, *OF_TEXT)


@dataclass(frozen=True)
class Config(classification.Config):
    scheme: str = "mutual"
    large: bool = False

    @property
    def steps(self) -> int:
        if self.scheme in OF_TEXT:
            text = self.text()
            return text.teacher_steps + self.students * (text.start_steps + 2 * text.more_steps)
        return self.teacher_steps + 2 * self.students

    def text(self) -> language.Config:
        """The language model's task in proportion."""
        whole = language.Config()
        share = min(self.epochs / Config.epochs, 1.0)
        return language.Config(
            seed=self.seed, backend=self.backend, device=self.device,
            teacher_steps=-(-whole.teacher_steps * min(self.teacher_epochs, Config.teacher_epochs) // Config.teacher_epochs),
            start_steps=max(round(share * whole.start_steps), 1), more_steps=max(round(share * whole.more_steps), 1),
            writes=max(round(share * whole.writes), 1),
        )  # fmt: skip


@dataclass
class Outcome:
    """What ran the losses, and held-out accuracy in percent, or perplexity: the teacher's, and every student's both ways."""

    config: Config
    backend: str
    teacher: float
    students: Comparison


class Class:
    """The digits, a teacher who saw all labels, and any number of students with few."""

    def __init__(self, config: classification.Config, bar: Reporter):
        self.config, self.device = config, config.torch_device()
        self.digits = data.digits(config.seed, classification.HELD_OUT).to(self.device)
        self.teacher = classification.trained_teacher(config, self.digits, self.device, bar)

    def test(self, model: nn.Module, how: Callable[..., float] = accuracy) -> float:
        return how(model, self.digits.test_images, self.digits.test_labels)

    def problem(self, k: int) -> Problem:
        """The k-th student's."""
        seed = self.config.student_seed(k)
        labels = self.digits.labels
        seen = data.few_of_each(labels.cpu(), classification.IMAGES_PER_CLASS, torch.Generator().manual_seed(seed))
        seen = seen.to(self.device)
        return Problem(
            self.config, seed, self.device, self.digits.images[seen], labels[seen], self.digits.images, self.teacher
        )


def run(config: Config, bar: Reporter) -> Outcome:
    """Trains a teacher, which only some schemes ask, then every student both ways from the same weights."""
    if config.scheme in OF_TEXT:
        return _run_text(config, bar)
    device = config.torch_device()
    backend = backends.resolve("distillation_loss", (torch.empty(0, device=device),), config.backend)
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False), classification.one_thread():
        pupils = Class(config, bar)
        way = WAYS[config.scheme]
        students = Comparison("scheme", config.scheme, way.other)
        for k in range(config.students):
            bar.step(f"student {k + 1} of {config.students}")
            for train, found in ((way.alone, students.alone), (way.train, students.found)):
                found.append(pupils.test(train(pupils.problem(k)), way.test))
                bar.advance()
        return Outcome(config, classification.described(backend), pupils.test(pupils.teacher), students)


def _run_text(config: Config, bar: Reporter) -> Outcome:
    with classification.one_thread():
        lesson = language.Lesson(config.text(), bar)
        students = Comparison("text", config.scheme, "its text alone")
        for k in range(config.students):
            bar.step(f"student {k + 1} of {config.students}")
            first = lesson.begun(config.student_seed(k))
            written = lesson.written()
            for way, found in ((language.ALONE, students.alone), (OF_TEXT[config.scheme], students.found)):
                found.append(lesson.further(first, way, written))
        backend = classification.described(lesson.backend)
        return Outcome(config, backend, lesson.perplexity(lesson.teacher), students)


def show(outcome: Outcome) -> None:
    """What was measured without and with, and the gain student by student, whatever it is."""
    config, students = outcome.config, outcome.students
    of_text = students.kind == "text"
    without, with_scheme, gain = students.cells()
    title = (
        "Python's reference manual by characters: held-out perplexity, lower is better" if of_text
        else "Handwritten digits: held-out accuracy in percent"
    )  # fmt: skip
    print_table(
        f"{title}, {of_students(config.students)}",
        ("model", "perplexity" if of_text else "accuracy", "gain"),
        [
            ("teacher with all " + ("text" if of_text else "labels"), f"{outcome.teacher:.{students.digits}f}", ""),
            (f"student, {students.other}", without, ""),
            (f"student, {students.name}", with_scheme, gain),
        ],
    )
    print(f"Backend: {outcome.backend}")
    seen = f"{language.SEEN} characters" if of_text else f"{classification.IMAGES_PER_CLASS * data.CLASSES} labels"
    order = "" if of_text else " and see them in the same order"
    print(
        f"\nA student sees {seen}; both ways start from the same weights{order}."
        f"\nRead a gain against its spread. The numbers come again with --seed {config.seed}."
    )
