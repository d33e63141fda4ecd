"""Calls into the compiled kernels, CPU and CUDA alike."""

from __future__ import annotations

from typing import Any

import torch

from kdkernels import backends
from kdkernels.ops.gram_match.kinds import Normalize

TILE, SHARE, BLOCKS = 64, 512, 256  # of the CUDA kernels: a tile's side, the least share of a split, blocks wanted


def splits_of(samples: int, rows: int, columns: int, features: int, tile: int = TILE) -> int:
    """Into how many shares a reduction is split so that few tiles still fill a GPU. Only shapes decide."""
    tiles = 2 * samples * -(-rows // tile) * -(-columns // tile)
    return max(1, min(BLOCKS // tiles, features // SHARE, 64))


def forward(
    backend: str,
    student: torch.Tensor,
    student_other: torch.Tensor | None,
    teacher: torch.Tensor | None,
    *args: Any,
) -> None:
    """The entry gram_match; the arguments are op.py's."""
    library = backends.library(backend)
    scratch: tuple[Any, ...] = ()
    if backend != "cpu":
        *_, normalize, _order = args
        samples, rows, _ = student.shape
        columns = rows if student_other is None else student_other.shape[1]
        models = [student] if teacher is None else [student, teacher]
        splits = splits_of(samples, rows, columns, max(x.shape[2] for x in models))
        size = samples * rows
        for x in models:
            vectors = samples * (x.shape[2] if normalize == Normalize.COLUMNS else rows)
            size += samples * rows * columns * (1 if splits == 1 else 1 + splits) + 2 * vectors + 3 * samples * rows
        scratch = (torch.empty(size, dtype=torch.float32, device=student.device), splits)
    library.call("gram_match", student, student_other, teacher, *args, *scratch, *library.context(student))
