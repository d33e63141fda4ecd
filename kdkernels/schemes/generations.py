"""Teachers in a row: born-again generations, teacher assistants, and ensembles of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from kdkernels.typed import typed

# (student, teachers) -> None: trains the student in place; the teachers are frozen meanwhile.
Train = Callable[[nn.Module, Sequence[nn.Module]], Any]


@contextlib.contextmanager
@typed
def frozen(*models: nn.Module) -> Iterator[None]:
    """In here the models are in eval mode and their parameters require no gradient; afterwards all is as before."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    flags = [(p, p.requires_grad) for model in models for p in model.parameters()]
    try:
        for model in models:
            model.eval().requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for p, requires_grad in flags:
            p.requires_grad_(requires_grad)


@typed
def distill_chain(
    students: Iterable[nn.Module], train: Train, *, teacher: nn.Module | None = None, dense: bool = False
) -> list[nn.Module]:
    """Trains students one after the other, each taught by the one before: teacher assistants.

        def train(student, teachers):
            for x, y in loader:
                with torch.no_grad():
                    target = schemes.average_logits(teachers, x)
                loss = kdkernels.distillation_loss(student(x), target, y)
                ...

        assistant, student = distill_chain([medium, small], train, teacher=large)

    Mirzadeh et al. (2020, arXiv:1902.03393): where a student is too small for its teacher, models of sizes between
    them help. `dense`: each learns from all before it (Son et al. 2021, arXiv:2009.08825).

    Args:
        students: models, largest first; a generator makes each when its turn comes.
        train: train(student, teachers) trains one student in place, by any loop. `teachers` is a tuple, empty for the
            first where there is no `teacher`; the student is in train mode, the teachers are frozen in eval mode.
        teacher: the first teacher; it comes out as it went in.

    Returns:
        The trained students.

    Raises:
        ValueError: a student that is among its own teachers.
    """
    before = [] if teacher is None else [teacher]
    trained: list[nn.Module] = []
    for k, student in enumerate(students):
        teachers = tuple(before if dense else before[-1:])
        if any(student is other for other in before):
            raise ValueError(f"students[{k}] is one of its own teachers")
        with frozen(*teachers):
            student.train()
            train(student, teachers)
        before.append(student)
        trained.append(student)
    return trained


@typed
def born_again(
    make: Callable[[], nn.Module], generations: int, train: Train, *, teacher: nn.Module | None = None
) -> list[nn.Module]:
    """Generations of one architecture, each taught by the one before.

    Furlanello et al., born-again networks (2018, arXiv:1805.04770). Without a teacher the first generation learns from
    labels alone. `average_logits` of the result is the paper's ensemble (BANE).

    Args:
        make: makes a fresh model, with weights of its own.
        generations: how many to train, at least 1.
        train, teacher: as distill_chain.

    Raises:
        ValueError: less than one generation; `make` gives the same model again.
    """
    if generations < 1:
        raise ValueError(f"generations must be at least 1, got {generations}")
    return distill_chain((make() for _ in range(generations)), train, teacher=teacher)


def average_logits(models: Sequence[nn.Module], *args: Any, **kwargs: Any) -> torch.Tensor:
    """The mean of what the models return for the same input.

    Raises:
        ValueError: no model.
    """
    if len(models) == 0:
        raise ValueError("models must hold at least one")
    return torch.stack([model(*args, **kwargs) for model in models]).mean(0)
