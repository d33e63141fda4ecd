"""`kdkernels demo`: trains small students on real data, with plain PyTorch's losses and with these.

data.py, models.py and train.py know nothing of a particular loss; an experiment puts them together and shows what came
out: classification.py with report.py (labels and a teacher's scores), relations.py (a teacher's relations between images),
language.py (a language model's text and its judgement of a student's), schemes.py with ways.py (kdkernels.schemes), and
everything.py (all of it in one table).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCORES = "kd"
PLOT_SUFFIXES = (".png", ".pdf", ".svg")


def _number(
    kind: Callable[[str], float], low: float, high: float = math.inf, above: bool = False
) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not (low < value if above else low <= value) or value > high or not math.isfinite(value):
            bounds = (
                f"{'above' if above else 'at least'} {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            )
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return value

    parse.__name__ = kind.__name__  # for argparse's own message
    return parse


def _plot(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(PLOT_SUFFIXES)}, got {text}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


TASKS = ("classification", "features", "segmentation", "lm")


def _loss(text: str) -> str:
    from kdkernels.demo.relations import RELATIONS

    known = (SCORES, *RELATIONS)
    if text not in known:
        raise argparse.ArgumentTypeError(f"choose among {', '.join(known)}; got {text}")
    return text


def _scheme(text: str) -> str:
    from kdkernels.demo.schemes import SCHEMES

    if text not in SCHEMES:
        raise argparse.ArgumentTypeError(f"choose among {', '.join(SCHEMES)}; got {text}")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task", choices=TASKS, default=TASKS[0], help="classification; features: the same with a loss between maps (at unless "
        "--loss says another); segmentation: each pixel's digit, with pixel-wise and channel-wise losses; "
        "lm: a language model of Python's own manual, which takes --seed, --backend and --device",
    )  # fmt: skip
    parser.add_argument(
        "--loss", type=_loss, help="kd: a teacher's scores (default); or its relations between images, in a "
        "middle layer: rkd, sp, cc, pkt, graph, gram, nst; or its map there: at, channel-at, hint, pkd",
    )  # fmt: skip
    parser.add_argument(
        "--scheme", type=_scheme, metavar="NAME", help="a way of training against labels alone: mutual, online, ema, "
        "ensemble, temporal, earlier-epoch, auxiliary-heads, early-exit, born-again, assistant, annealed, capacity, "
        "confidence, learnable-temperature, semi-supervised, synthetic, lwf (two tasks in turn), anchor; of text: sequence, "
        "on-policy; no --task, --loss or --plot beside it",
    )  # fmt: skip
    parser.add_argument(
        "--all", dest="everything", action="store_true", help="one table of every scheme, and of every loss that digits or "
        "text can show; no --task, --scheme, --loss or --plot beside it",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="as little training as shows that it runs: --epochs 2 --students 1 "
        "--teacher-epochs 1 unless given, and --no-large",
    )  # fmt: skip
    parser.add_argument(
        "--weight", type=_number(float, 0), help="of a relational loss beside the labels' (default: its own)"
    )
    parser.add_argument(
        "--seed", type=_number(int, 0), default=0, help="same seed, same numbers (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=_number(int, 1), help="of every student (default: 100)")
    parser.add_argument(
        "--students", type=_number(int, 1), help="how many, for mean and spread (default: 10, with --all 3)"
    )
    parser.add_argument("--teacher-epochs", type=_number(int, 1), help="(default: 12)")
    parser.add_argument("--temperature", type=_number(float, 0, above=True), default=4.0, help="(default: %(default)s)")
    parser.add_argument(
        "--alpha", type=_number(float, 0, 1), default=0.9, help="the distillation term's weight (default: %(default)s)"
    )
    parser.add_argument("--backend", default="auto", choices=("auto", "cuda", "triton", "cpu", "reference"))
    parser.add_argument(
        "--device", help="a torch device (default: a GPU where there is one and the backend runs on it)"
    )
    parser.add_argument(
        "--plot", type=_plot, metavar="FILE.png", help="draw accuracy, loss curves and their difference"
    )
    parser.add_argument(
        "--no-large", dest="large", action="store_false", help="do not time the loss at a language model's size too"
    )


def run(args: argparse.Namespace) -> int:
    """Trains, prints, draws. Returns the exit code: 0, or 2 where the backend asked for cannot run."""
    from kdkernels.backends import BackendError
    from kdkernels.cli.console import progress
    from kdkernels.demo import classification, everything, language, relations, report, schemes, segmentation

    loss = args.loss or (relations.FEATURES[0] if args.task == "features" else SCORES)
    if args.task == "features" and loss not in relations.FEATURES:
        print(
            f"kdkernels demo: --task features takes --loss {', '.join(relations.FEATURES)}; got {loss}", file=sys.stderr
        )
        return 2
    if args.task == "segmentation" and args.loss:
        print("kdkernels demo: --task segmentation shows both of its losses: leave --loss out", file=sys.stderr)
        return 2
    if args.task == "lm" and (args.loss or args.plot):
        print("kdkernels demo: --task lm takes neither --loss nor --plot", file=sys.stderr)
        return 2
    if args.scheme and (args.task != TASKS[0] or args.loss or args.plot):
        print("kdkernels demo: --scheme takes neither --task, --loss nor --plot", file=sys.stderr)
        return 2
    if args.everything and (args.task != TASKS[0] or args.loss or args.scheme or args.plot):
        print("kdkernels demo: --all takes neither --task, --loss, --scheme nor --plot", file=sys.stderr)
        return 2
    epochs, students, teacher_epochs = (2, 1, 1) if args.quick else (100, 3 if args.everything else 10, 12)
    common = {
        "seed": args.seed, "epochs": args.epochs or epochs, "students": args.students or students,
        "teacher_epochs": args.teacher_epochs or teacher_epochs, "backend": args.backend, "device": args.device,
    }  # fmt: skip
    experiment: Any
    config: Any
    if args.everything:
        experiment = shown = everything
        config = everything.Config(**common)
    elif args.scheme:
        experiment = shown = schemes
        config = schemes.Config(**common, scheme=args.scheme)
    elif args.task == "lm":
        experiment = shown = language
        config = language.Config(seed=args.seed, backend=args.backend, device=args.device)
    elif args.task == "segmentation":
        experiment = shown = segmentation
        config = segmentation.Config(**common)
    elif loss == SCORES:
        experiment, shown = classification, report
        config = classification.Config(
            **common, temperature=args.temperature, alpha=args.alpha, large=args.large and not args.quick
        )
    else:
        experiment = shown = relations
        config = relations.Config(**common, loss=loss, weight=args.weight)
    try:
        with progress(config.steps, lines=False) as bar:
            outcome = experiment.run(config, bar)
    except BackendError as error:
        print(f"kdkernels demo: {error}", file=sys.stderr)
        return 2
    shown.show(outcome)
    if args.plot:
        shown.plot(outcome, args.plot)
        print(f"drawn: {args.plot}")
    return 0
