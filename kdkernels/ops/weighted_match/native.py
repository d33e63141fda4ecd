"""Calls into the compiled kernels."""

from __future__ import annotations

from typing import Any

from kdkernels import backends
from kdkernels.native import View


def call(backend: str, name: str, x: View, *args: Any) -> None:
    """An entry of csrc/weighted_match; the arguments are op.py's."""
    library = backends.library(backend)
    library.call(name, x, *args, *library.context(x.tensor))
