"""Calls into the compiled kernels."""

from __future__ import annotations

from typing import Any

import torch

from kdkernels import backends

TILE_ELEMENTS, TILE_LANES = 1 << 17, 1024  # the kernels keep a tile's lanes in buffers of this size


def tile(lanes: int) -> tuple[int, int]:
    """Rows and lanes of a tile, of a map with this many lanes."""
    return TILE_ELEMENTS // min(lanes, TILE_LANES), TILE_LANES


def call(backend: str, name: str, x: torch.Tensor, *args: Any) -> None:
    """An entry of csrc/weighted_match; the arguments are op.py's."""
    library = backends.library(backend)
    library.call(name, x, *args, *library.context(x))
