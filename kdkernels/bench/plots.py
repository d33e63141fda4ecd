"""Bars of speed-up over plain PyTorch and of the share of the floor reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdkernels.bench.results import describe_environment, ratio


def plot(path: Path, content: dict[str, Any]) -> None:
    """Draws forward + backward of every row of a result file's content as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in content["rows"] if r["status"] == "ok" and r["mode"] != "forward" and r["contender"] != "floor"]
    places = list(dict.fromkeys((r["case"], r["label"], r["dtype"]) for r in rows))
    names = list(dict.fromkeys(r["contender"] for r in rows))
    figure, axes = pyplot.subplots(2, 1, figsize=(max(7, 1.3 * len(places)), 8), layout="constrained")
    width = 0.8 / max(1, len(names))
    for axis, over, title in zip(
        axes, ("eager", "floor"), ("times faster than eager PyTorch", "share of measured bandwidth floor")
    ):
        for i, name in enumerate(names):
            at = [(places.index((r["case"], r["label"], r["dtype"])), r) for r in rows if r["contender"] == name]
            bars = [(x + i * width, 1.0 if over == name else ratio(r, over)) for x, r in at]
            bars = [(x, y) for x, y in bars if y is not None]
            if bars:
                axis.bar(*zip(*bars), width, label=name)
        axis.set_title(title)
        axis.set_xticks([x + 0.4 - width / 2 for x in range(len(places))], ["\n".join(p) for p in places], fontsize=7)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"loss and gradient: {describe_environment(content['environment'])}", fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
