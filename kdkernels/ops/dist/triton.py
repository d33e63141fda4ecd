"""Launchers of the Triton kernels of DIST: the same entry points as the compiled extension."""

from __future__ import annotations

from typing import Any

import torch
import triton

from kdkernels.native import View
from kdkernels.ops.dist.triton_kernels import (
    column_kernel,
    count_kernel,
    finish_kernel,
    gradient_kernel,
    row_kernel,
    total_kernel,
)
from kdkernels.ops.triton_util import on, power

TILE = 2048  # elements a program holds of each model at a time
COLUMNS = 32  # classes of a column program
BLOCK = 1024


def _plan(classes: int) -> dict[str, int]:
    C = min(power(classes), TILE)
    R = max(TILE // C // 2, 1)
    return {"R": R, "C": C, "num_warps": min(max(R * C // 256, 1), 8)}


def _unpack(scalars: torch.Tensor) -> tuple[torch.Tensor | None, list[float]]:
    """(pointer or None, values): numbers go by value, a tensor on a GPU is read by the kernel."""
    return (scalars, [1.0, 0.0, 0.0, 0.0]) if scalars.device.type != "cpu" else (None, scalars.tolist())


def forward(
    student: View, teacher: View, labels: Any, weight: Any, scalars: torch.Tensor, total: View, stats: torch.Tensor,
    columns: torch.Tensor, sums: torch.Tensor, scratch: torch.Tensor, clamp: int, ignore_index: int, chunks: int,
) -> None:  # fmt: skip
    """The entry dist_forward. Arguments as in native.py, less the context."""
    s, t = student.tensor, teacher.tensor
    outer, V, inner = student.shape
    rows = outer * inner
    pointer, (temperature, beta, gamma, eps) = _unpack(scalars)
    if rows == 0:
        total.tensor.zero_()
        return
    strides = (*student.stride, *teacher.stride)
    share, blocks = triton.cdiv(rows, chunks), triton.cdiv(V, COLUMNS)
    tile = _plan(V)
    moments, parts = scratch[2 * chunks * V :], scratch[5 * chunks * V :]
    with on(s.device):
        count_kernel[(1,)](labels, weight, sums, rows, V, ignore_index, B=BLOCK)
        row_kernel[(triton.cdiv(rows, tile["R"]),)](
            s, t, labels, weight, pointer, stats, temperature, eps, rows, inner, V, *strides, clamp, ignore_index, **tile
        )
        if rows > 1:
            for means in (True, False):
                column_kernel[(blocks, chunks)](
                    s, t, labels, weight, pointer, stats, columns, sums, scratch, moments, temperature, rows, inner, V,
                    *strides, share, chunks, ignore_index, MEANS=means, R=32, C=COLUMNS, num_warps=4,
                )  # fmt: skip
            finish_kernel[(blocks,)](moments, columns, parts, pointer, eps, V, chunks, clamp, C=COLUMNS, num_warps=1)
        total_kernel[(1,)](
            stats, labels, weight, pointer, sums, parts, total.tensor, beta, gamma, rows, V, blocks if rows > 1 else 0,
            ignore_index, B=BLOCK,
        )  # fmt: skip


def backward(
    student: View, teacher: View, labels: Any, weight: Any, scalars: torch.Tensor, stats: torch.Tensor,
    columns: torch.Tensor, sums: torch.Tensor, upstream: torch.Tensor, ds: View | None, dt: View | None, clamp: int,
    ignore_index: int,
) -> None:  # fmt: skip
    """The entry dist_backward. Arguments as in native.py, less the context."""
    outer, V, inner = student.shape
    rows = outer * inner
    pointer, (temperature, beta, gamma, _) = _unpack(scalars)
    strides = [x for view in (student, teacher, ds, dt) for x in (view.stride if view is not None else (0, 0, 0))]
    tile = _plan(V)
    with on(student.tensor.device):
        gradient_kernel[(triton.cdiv(rows, tile["R"]),)](
            student.tensor, teacher.tensor, labels, weight, pointer, stats, columns, sums, upstream,
            ds.tensor if ds is not None else None, dt.tensor if dt is not None else None,
            temperature, beta, gamma, rows, inner, V, *strides, ignore_index, **tile,
        )  # fmt: skip


def aot_signatures() -> list[dict]:
    """Representative compilations for kdkernels.bench.static."""
    tile = _plan(32000)

    def compiled(name: str, kernel: Any, absent: tuple[str, ...], num_warps: int, **constexprs: Any) -> dict:
        types = dict.fromkeys(kernel.arg_names, "i32")
        types |= dict.fromkeys(("s", "t", "ds", "dt"), "*bf16")
        types |= dict.fromkeys(("stats", "columns", "sums", "scratch", "moments", "upstream"), "*fp32")
        types |= dict.fromkeys(("temperature", "beta", "gamma", "eps"), "fp32")
        fixed = {**dict.fromkeys(("labels", "weight", "scalars", *absent)), **constexprs}
        fixed |= dict.fromkeys(("s_c", "t_c", "ds_c", "dt_c"), 1)
        types = {n: "constexpr" if n in fixed else types[n] for n in kernel.arg_names}
        loose = ("rows", "inner", "share", "chunks", "clamp", "ignore_index")
        return {
            "name": name, "kernel": kernel, "signature": types, "constexprs": {n: v for n, v in fixed.items() if n in types},
            "divisible": [n for n, k in types.items() if k not in ("constexpr", "fp32") and n not in loose],
            "num_warps": num_warps, "num_stages": 3,
        }  # fmt: skip

    rows = {"R": tile["R"], "C": tile["C"]}
    return [
        compiled("DIST rows", row_kernel, (), tile["num_warps"], **rows),
        compiled("DIST column sums", column_kernel, (), 4, MEANS=True, R=32, C=COLUMNS),
        compiled("DIST column moments", column_kernel, (), 4, MEANS=False, R=32, C=COLUMNS),
        compiled("DIST gradient", gradient_kernel, ("dt",), tile["num_warps"], **rows),
        compiled("DIST both gradients", gradient_kernel, (), tile["num_warps"], **rows),
    ]
