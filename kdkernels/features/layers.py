"""Proposals which of a student's layers learns from which of a teacher's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from kdkernels.features.capture import FeatureCapture, Features, unwrapped
from kdkernels.typed import typed

Pairs = list[tuple[str, str]]


@typed
def layers_of(model: nn.Module) -> list[str]:
    """The layers to choose from: members of a model's Sequentials and ModuleLists that have parameters, in their order.

    Lists inside lists (stages of blocks) are followed, what is inside a member is not. A model without any list offers
    its modules without children.
    """
    model = unwrapped(model)
    found: list[str] = []

    def visit(module: nn.Module, path: str) -> None:
        listed = isinstance(module, (nn.Sequential, nn.ModuleList))
        for name, child in module.named_children():
            at = f"{path}.{name}" if path else name
            if not listed or isinstance(child, (nn.Sequential, nn.ModuleList)):
                visit(child, at)
            elif any(True for _ in child.parameters()):
                found.append(at)

    visit(model, "")
    return found or [n for n, m in model.named_modules() if n and not list(m.children()) and list(m.parameters(False))]


@typed
def match_layers(
    student: nn.Module,
    teacher: nn.Module,
    how: str | Sequence[tuple[str, str]],
    *,
    batch: Any = None,
    loss: Callable[[Any], torch.Tensor] | None = None,
    count: int = 3,
) -> Pairs:
    """Pairs (student layer, teacher layer) for FeatureCapture and MultiLayerLoss.

    A student's layer at a fraction of its depth is paired with the teacher's at the same fraction.

    Args:
        student, teacher: the models; both in the mode (train or eval) that they are looked at in.
        how: "every-3" (or any number): each third of the student's `layers_of`; "before-downsample": in both models the
            last layer before each change to a smaller map, and the last layer of all, paired from the end;
            "sensitivity": the `count` layers of the student at which a step along the loss's gradient changes it most
            for the layer's size, |g| |x| summed over a batch; or a list of pairs, which are only checked.
        batch: what the models are called with (a tuple is spread), for "before-downsample" and "sensitivity".
        loss: loss(student's output) -> a scalar, for "sensitivity".
        count: how many, for "sensitivity".

    Raises:
        ValueError: an unknown `how`, a batch or loss that is missing, nothing to choose from.
        KeyError: a pair that names a layer that is not there.
    """
    if not isinstance(how, str):
        pairs = [(s, t) for s, t in how]
        for model, names in ((student, [s for s, _ in pairs]), (teacher, [t for _, t in pairs])):
            FeatureCapture(model, names).close()
        return pairs
    students, teachers = layers_of(student), layers_of(teacher)
    if not students or not teachers:
        raise ValueError("a model has no layers to choose from: name the pairs in a list")
    if how.startswith("every-") and how[6:].isdigit() and int(how[6:]) > 0:
        chosen = students[int(how[6:]) - 1 :: int(how[6:])]
        return _at_same_depth(chosen, students, teachers)
    if how not in ("before-downsample", "sensitivity"):
        raise ValueError(f"how must be 'every-<n>', 'before-downsample', 'sensitivity' or a list of pairs, got {how!r}")
    if batch is None:
        raise ValueError(f"{how!r} looks at a batch: pass batch=")
    if how == "before-downsample":
        ends = [_stage_ends(m, names, batch) for m, names in ((student, students), (teacher, teachers))]
        # From the end, where the models' maps agree: the stem of one may have more steps.
        return list(zip(reversed(ends[0]), reversed(ends[1])))[::-1]
    if loss is None:
        raise ValueError("'sensitivity' needs the loss of the student's output: pass loss=")
    felt = _sensitivities(student, students, batch, loss)
    best = sorted(felt, key=lambda name: -felt[name])[:count]
    return _at_same_depth([name for name in students if name in best], students, teachers)


def _at_same_depth(chosen: list[str], students: list[str], teachers: list[str]) -> Pairs:
    def partner(name: str) -> str:
        depth = (students.index(name) + 1) / len(students)
        return teachers[max(0, round(depth * len(teachers)) - 1)]

    return [(name, partner(name)) for name in chosen]


def _run(model: nn.Module, names: list[str], batch: Any) -> tuple[Any, Features]:
    with FeatureCapture(model, names) as capture:
        return capture(*batch) if isinstance(batch, tuple) else capture(batch)


def _stage_ends(model: nn.Module, names: list[str], batch: Any) -> list[str]:
    """The last layer of every run of layers with one map size; sizes are those past the channel axis."""
    with torch.no_grad():
        _, features = _run(model, names, batch)
    sizes = {name: tuple(features[name].shape[2:]) for name in names}
    maps = [name for name in names if sizes[name]]  # without what has no map: heads
    if not maps:
        raise ValueError("'before-downsample' needs layers with maps (N, C, H, W)")
    return [name for name, after in zip(maps, [*maps[1:], ""]) if not after or sizes[after] != sizes[name]]


def _sensitivities(
    model: nn.Module, names: list[str], batch: Any, loss: Callable[[Any], torch.Tensor]
) -> dict[str, float]:
    with torch.enable_grad():
        output, features = _run(model, names, batch)
        known = [name for name in names if features[name].requires_grad]
        grads = torch.autograd.grad(loss(output), [features[name] for name in known], allow_unused=True)
    # The user waits for this once: it is not in a training step.
    return {
        name: float(g.float().norm() * features[name].detach().float().norm())
        for name, g in zip(known, grads)
        if g is not None
    }
