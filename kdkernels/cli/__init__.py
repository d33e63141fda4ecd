"""The command `kdkernels`: demo, bench, check, info."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

import kdkernels
from kdkernels.console import UsageError

COMMANDS = {
    "demo": "train a small student on real data with plain PyTorch's loss and with this one",
    "bench": "time every loss against plain PyTorch, torch.compile and other libraries",
    "check": "compare every kernel on this machine with float64",
    "info": "what is installed here, which backends run, and what to do about those that do not",
}
# Which extra brings a module that an installation may lack.
EXTRAS = {
    "sklearn": ("scikit-learn", "demo"),
    "matplotlib": ("matplotlib", "bench"),
    "numpy": ("numpy", "bench"),
    "rich": ("rich", "bench"),
    "pytest_benchmark": ("pytest-benchmark", "bench"),
    "triton": ("triton", "triton"),
}


def _command(name: str) -> ModuleType:
    """The module of a subcommand, imported only when it is asked for."""
    return importlib.import_module("kdkernels.demo" if name == "demo" else f"kdkernels.cli.{name}")


def _missing(command: str, error: ModuleNotFoundError) -> str | None:
    """What to install, in one line, or None where the missing module is no extra's."""
    package, extra = EXTRAS.get((error.name or "").partition(".")[0], (None, None))
    if package is None:
        return None
    extra = "demo" if command == "demo" and extra == "bench" else extra
    return f"kdkernels {command} needs {package}: pip install 'kdkernels[{extra}]' (in a checkout: pip install '.[{extra}]')"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 a check failed, 2 it could not run."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="kdkernels", description=kdkernels.__doc__)
    parser.add_argument("--version", action="version", version=f"kdkernels {kdkernels.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    chosen = next((a for a in arguments if not a.startswith("-")), None)
    module = None
    try:
        for name, summary in COMMANDS.items():
            subparser = subparsers.add_parser(name, help=summary, description=summary)
            if name == chosen:
                module = _command(name)
                module.add_arguments(subparser)
        args = parser.parse_args(arguments)
        assert module is not None, "argparse lets only known commands through"
        code = module.run(args)
        sys.stdout.flush()
        return code
    except ModuleNotFoundError as error:
        message = _missing(chosen or "", error)
        if message is None:
            raise
        print(message, file=sys.stderr)
        return 2
    except UsageError as error:
        print(f"kdkernels {chosen}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever was reading, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        return 141
