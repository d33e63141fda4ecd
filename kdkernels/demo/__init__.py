"""`kdkernels demo`: trains small students on real data, with plain PyTorch's losses and with these.

data.py, models.py, train.py and report.py know nothing of a particular loss. An experiment puts them together, as `Config`,
`run`, `show` and, some, `plot`: classification.py (labels and a teacher's scores), relations.py (a teacher's relations
between images, or its maps), segmentation.py (each pixel's class), language.py (a language model's text and its judgement of
a student's), schemes.py with ways.py (kdkernels.schemes), and everything.py (all of it in one table).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdkernels.console import UsageError

SCORES = "kd"
TASKS = ("classification", "features", "segmentation", "lm")
PLOT_SUFFIXES = (".png", ".pdf", ".svg")
# By the name of an experiment's module, the options that it takes beside those that all take.
OPTIONS = {
    "classification": ("--loss", "--students", "--temperature", "--alpha", "--plot"),
    "relations": ("--task", "--loss", "--students", "--weight", "--plot"),
    "segmentation": ("--task", "--students", "--plot"),
    "language": ("--task",),
    "schemes": ("--scheme", "--students"),
    "everything": ("--students",),
}


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
        "--task", choices=TASKS, default=TASKS[0], help="classification (default); features: the same with a loss between "
        "maps (at unless --loss says another); segmentation: each pixel's digit, with pixel-wise and channel-wise losses; "
        "lm: one language model of Python's own manual",
    )  # fmt: skip
    parser.add_argument(
        "--loss", type=_loss, metavar="NAME", help="kd: a teacher's scores (default); or its relations between images, in a "
        "middle layer: rkd, sp, cc, pkt, graph, gram, nst; or its map there: at, channel-at, hint, pkd",
    )  # fmt: skip
    parser.add_argument(
        "--scheme", type=_scheme, metavar="NAME", help="a way of training against labels alone: mutual, online, ema, "
        "ensemble, temporal, earlier-epoch, auxiliary-heads, early-exit, born-again, assistant, annealed, capacity, "
        "confidence, learnable-temperature, semi-supervised, synthetic, lwf (two tasks in turn), anchor; of text: sequence, "
        "on-policy",
    )  # fmt: skip
    parser.add_argument(
        "--all", dest="everything", action="store_true", help="one table of every scheme, and of every loss that digits or "
        "text can show, in some minutes",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="as little training as shows that it runs: --epochs 2 --students 1 "
        "--teacher-epochs 1 unless given, and --no-large",
    )  # fmt: skip
    parser.add_argument(
        "--weight", type=_number(float, 0), help="of a relational or feature loss beside the labels' (default: its own)"
    )
    parser.add_argument(
        "--seed", type=_number(int, 0), default=0, help="same seed, same numbers (default: %(default)s)"
    )
    parser.add_argument(
        "--epochs", type=_number(int, 1), help="of every student (default: 100); of text, fewer is as much less of it"
    )
    parser.add_argument(
        "--students", type=_number(int, 1), help="how many, for mean and spread (default: 10; with --all 3)"
    )
    parser.add_argument("--teacher-epochs", type=_number(int, 1), help="of the teacher (default: 12)")
    parser.add_argument("--temperature", type=_number(float, 0, above=True), help="of --loss kd (default: 4)")
    parser.add_argument(
        "--alpha", type=_number(float, 0, 1), help="of --loss kd, the distillation term's weight (default: 0.9)"
    )
    parser.add_argument(
        "--backend", default="auto", choices=("auto", "cuda", "triton", "cpu", "reference"),
        help="what runs kdkernels' losses (default: the best that runs here)",
    )  # fmt: skip
    parser.add_argument(
        "--device", help="a torch device (default: a GPU where there is one and the backend runs on it)"
    )
    parser.add_argument(
        "--plot", type=_plot, metavar="FILE.png", help="draw accuracy, loss curves and their difference"
    )
    parser.add_argument(
        "--no-large", dest="large", action="store_false", help="do not time --loss kd at a language model's size too"
    )


def _chosen(args: argparse.Namespace) -> tuple[Any, Any]:
    """The experiment's module and its configuration.

    Raises:
        UsageError: an option that the experiment does not take.
    """
    from kdkernels.bench import select
    from kdkernels.demo import classification, everything, language, relations, schemes, segmentation

    loss = args.loss or (relations.FEATURES[0] if args.task == "features" else SCORES)
    if args.everything:
        experiment, about = everything, "--all"
    elif args.scheme:
        experiment, about = schemes, f"--scheme {args.scheme}"
    elif args.task == "lm":
        experiment, about = language, "--task lm"
    elif args.task == "segmentation":
        experiment, about = segmentation, "--task segmentation"
    else:
        experiment, about = (classification if loss == SCORES else relations), f"--loss {loss}"
    own = OPTIONS[experiment.__name__.rpartition(".")[2]]
    given = {
        "--task": args.task if args.task != TASKS[0] else None, "--loss": args.loss, "--scheme": args.scheme,
        "--students": args.students, "--weight": args.weight, "--temperature": args.temperature, "--alpha": args.alpha,
        "--plot": args.plot,
    }  # fmt: skip
    if odd := [option for option, value in given.items() if value is not None and option not in own]:
        raise UsageError(f"{about} does not take {' and '.join(odd)}")
    if args.task == "features" and loss not in relations.FEATURES:
        raise UsageError(f"--task features takes --loss {', '.join(relations.FEATURES)}; got {loss}")
    if args.device is not None:
        select.device(args.device)
    settings = {"seed": args.seed, "backend": args.backend, "device": args.device}
    settings |= {"epochs": 2, "students": 1, "teacher_epochs": 1} if args.quick else {}
    wished = ("epochs", "students", "teacher_epochs", "temperature", "alpha", "weight")
    settings |= {name: getattr(args, name) for name in wished if getattr(args, name) is not None}
    config: Any
    if experiment is language:
        config = schemes.Config(**settings).text()
    elif experiment is schemes:
        config = schemes.Config(**settings, scheme=args.scheme)
    elif experiment is relations:
        config = relations.Config(**settings, loss=loss)
    elif experiment is classification:
        config = classification.Config(**settings, large=args.large and not args.quick)
    else:
        config = experiment.Config(**settings)
    return experiment, config


def run(args: argparse.Namespace) -> int:
    """Trains, prints, draws. Returns the exit code, 0.

    Raises:
        UsageError: options that do not go together, or a device or backend that cannot run here.
    """
    from kdkernels.backends import BackendError
    from kdkernels.console import progress

    experiment, config = _chosen(args)
    try:
        with progress(config.steps, lines=False) as bar:
            outcome = experiment.run(config, bar)
    except BackendError as error:
        raise UsageError(str(error)) from None
    experiment.show(outcome)
    if args.plot:
        experiment.plot(outcome, args.plot)
        print(f"drawn: {args.plot}")
    return 0
