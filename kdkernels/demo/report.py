"""The demo's tables and its plot."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

from kdkernels.cli.console import print_table
from kdkernels.demo.classification import ALONE, BATCH, FUSED, LARGE, PLAIN, Outcome
from kdkernels.demo.data import CLASSES
from kdkernels.demo.train import Run


def mean(values: list[float], sign: str = "", digits: int = 1) -> str:
    """Mean and, of several, the standard deviation."""
    if len(values) == 1:
        return f"{values[0]:{sign}.{digits}f}"
    return f"{statistics.mean(values):{sign}.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def _final(runs: list[Run]) -> list[float]:
    return [run.accuracy[-1] for run in runs]


def _time(seconds: float) -> str:
    return (
        f"{seconds * 1e6:.0f} us"
        if seconds < 1e-3
        else f"{seconds * 1e3:.1f} ms"
        if seconds < 1
        else f"{seconds:.2f} s"
    )


def _steps(runs: list[Run]) -> list[float]:
    return [s for run in runs for s in run.seconds]


def speed(what: str, one: float, other: float) -> tuple[str, ...]:
    return what, _time(one), _time(other), f"{one / other:.2f}x"


def show(outcome: Outcome) -> None:
    """Accuracy of everybody; then the two losses against each other."""
    config, runs = outcome.config, outcome.runs
    many, few, held_out = outcome.images
    rows = [("teacher", f"{outcome.teacher_parameters}", f"{many}", f"{outcome.teacher_accuracy:.1f}", "")]
    alone = _final(runs[ALONE])
    for name, group in runs.items():
        gains = [x - y for x, y in zip(_final(group), alone, strict=True)]
        gain = "" if name == ALONE else mean(gains, "+")
        rows.append((f"student, {name}", f"{outcome.student_parameters}", f"{few}", mean(_final(group)), gain))
    students = f"mean ± standard deviation of {config.students} students" if config.students > 1 else "one student"
    print_table(
        f"Handwritten digits: accuracy in percent on {held_out} held-out images, {students}",
        ("model", "parameters", "images seen", "accuracy", "gain over labels alone"),
        rows,
    )

    threads = f", {torch.get_num_threads()} threads" if outcome.device.type == "cpu" else ""
    one, other = _steps(runs[PLAIN]), _steps(runs[FUSED])
    speeds = [
        speed(
            f"a training step, {BATCH} x {CLASSES} (median of {len(one)})",
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
        "\nAt ten classes a call costs what its launches cost; the time of the arithmetic shows at a vocabulary's size."
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
