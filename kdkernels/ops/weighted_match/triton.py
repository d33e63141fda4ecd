"""Launching the Triton kernels: the entries of csrc/weighted_match, by name."""

from __future__ import annotations

from typing import Any

import torch
import triton

from kdkernels.native import View
from kdkernels.ops.triton_util import on
from kdkernels.ops.weighted_match import triton_margin
from kdkernels.ops.weighted_match.reference import MEASURES
from kdkernels.ops.weighted_match.sums import MOMENTS, ordered_sum
from kdkernels.ops.weighted_match.triton_kernels import (
    compare_kernel,
    match_kernel,
    moments_gradient_kernel,
    moments_kernel,
    power_gradient_kernel,
    power_sums_kernel,
)

margin_rows = triton_margin.margin_rows
NO_POWER = torch.zeros(2)  # magnitudes themselves are summed

TILE_ROWS, MOST_LANES, ELEMENTS = 64, 512, 2048  # of a tile, and of what a program holds at a time


class _Launch:
    """A grid of tiles over a map, and where their shares of a sum go until they are added in order."""

    def __init__(self, x: torch.Tensor):
        self.x = x
        self.batch, self.height, self.width = x.shape
        lanes = min(MOST_LANES, max(16, triton.next_power_of_2(self.width)))
        self.pieces = triton.cdiv(self.width, lanes), triton.cdiv(self.height, TILE_ROWS)  # of rows, of lanes
        self.grid = (self.batch * self.pieces[0] * self.pieces[1],)
        self.options = {"ROWS": max(1, ELEMENTS // lanes), "LANES": lanes, "num_warps": 4}

    def shares(self, out: torch.Tensor | None, fields: int, lanes: bool) -> torch.Tensor | None:
        """(pieces, fields, batch, rows or lanes) for the sums `out`, or itself where there is one piece."""
        if out is None or self.pieces[lanes] == 1:
            return out
        kept = self.width if lanes else self.height
        return torch.empty(self.pieces[lanes], fields, self.batch, kept, dtype=out.dtype, device=out.device)


def _join(out: torch.Tensor | None, shares: torch.Tensor | None) -> None:
    if out is not None and shares is not None and shares is not out:
        out.copy_(shares.sum(0, dtype=torch.float64).view(out.shape))


def feature_power_sums(x, row_weight, lane_weight, scalars, rows, lanes, exponent, odd):
    launch = _Launch(x)
    of_rows, of_lanes = launch.shares(rows, 1, False), launch.shares(lanes, 1, True)
    power_sums_kernel[launch.grid](
        x, row_weight, lane_weight, of_rows, of_lanes, *x.shape, *x.stride()[:2], TILE_ROWS, scalars.tolist()[0],
        exponent, odd != 0, **launch.options,
    )  # fmt: skip
    _join(rows, of_rows)
    _join(lanes, of_lanes)


def feature_power_gradient(x, row_weight, lane_weight, scalars, rows, lanes, dx, exponent, odd):
    launch = _Launch(x)
    power_gradient_kernel[launch.grid](
        x, row_weight, lane_weight, rows, lanes, dx, *x.shape[1:], *x.stride()[:2], TILE_ROWS, scalars.tolist()[0],
        exponent, odd != 0, **launch.options,
    )  # fmt: skip


def feature_attention(
    s, t, scalars, total, by_s, by_t, ds, dt, exponent, odd, rows_of_s, rows_of_t, mean, squared, add_eps
):  # fmt: skip
    for x, by, of_rows in ((s, by_s, rows_of_s), (t, by_t, rows_of_t)):
        rows, lanes = (by, None) if of_rows else (None, by)
        feature_power_sums(x, None, None, scalars, rows, lanes, exponent, odd)
    batch, kept = by_s.shape
    each = torch.empty(batch, dtype=torch.float64, device=s.device)
    over = [x.shape[2 if of_rows else 1] for x, of_rows in ((s, rows_of_s), (t, rows_of_t))]
    lanes = min(1024, max(16, triton.next_power_of_2(kept)))
    compare_kernel[(batch,)](
        by_s, by_t, each, batch, kept, *over, scalars.tolist()[1], mean != 0, squared != 0, add_eps != 0, lanes
    )
    total.copy_(ordered_sum(each))
    for x, by, of_rows, dx in ((s, by_s, rows_of_s, ds), (t, by_t, rows_of_t, dt)):
        if dx is not None:
            rows, lanes = (by, None) if of_rows else (None, by)
            feature_power_gradient(x, None, None, scalars, rows, lanes, dx, exponent, odd)


def feature_match(
    s, t, row_weight, lane_weight, row_offset, lane_offset, scalars, upstream, total, rows, lanes, ds, dt, measure,
    row_magnitude=None, lane_magnitude=None,
):  # fmt: skip
    launch = _Launch(s)
    beta, factor = scalars.tolist()
    of_rows, of_lanes = launch.shares(rows, 2, False), launch.shares(lanes, 2, True)
    each = torch.empty(launch.grid, dtype=torch.float64, device=s.device)
    match_kernel[launch.grid](
        s, t, row_weight, lane_weight, row_offset, lane_offset, row_magnitude, lane_magnitude, upstream, each, of_rows,
        of_lanes, ds, dt, *s.shape, *s.stride()[:2], *t.stride()[:2], TILE_ROWS, beta, factor, measure, **launch.options,
    )  # fmt: skip
    total.copy_(ordered_sum(each) * factor)
    _join(rows, of_rows)
    _join(lanes, of_lanes)


def _attentions(x: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """FGD's over the rows and over the lanes, from one read."""
    batch, height, width = x.shape
    rows, lanes = (torch.empty(batch, n, dtype=torch.float32, device=x.device) for n in (height, width))
    feature_power_sums(x, None, None, NO_POWER, rows, lanes, 1, False)
    return (height * (rows / (width * temperature)).softmax(1), width * (lanes / (height * temperature)).softmax(1))


def feature_focal(s, t, mask, scalars, apart_weight, upstream, total, ds, pixels_are_rows):
    temperature, factor = scalars.tolist()
    weight = factor * apart_weight.reshape(())
    of_s, of_t = _attentions(s, temperature), _attentions(t, temperature)
    apart = weight * sum(ordered_sum((a - b).abs()) for a, b in zip(of_s, of_t, strict=True))
    magnitudes: list[torch.Tensor | None] = [None, None]
    if ds is not None:
        by = weight if upstream is None else weight * upstream.reshape(())
        for i, (a, b) in enumerate(zip(of_s, of_t, strict=True)):
            signs = (a - b).sign()
            slope = a * (signs - (signs * a).mean(1, keepdim=True))
            magnitudes[i] = slope * (by / (s.shape[2 - i] * temperature))
    rows, lanes = of_t
    mask = mask.reshape((rows if pixels_are_rows else lanes).shape)
    rows, lanes = (rows * mask, lanes) if pixels_are_rows else (rows, lanes * mask)
    feature_match(
        s, t, rows, lanes, None, None, torch.tensor([1.0, factor]), upstream, total, None, None, ds, None,
        MEASURES.index("squared"), *magnitudes,
    )  # fmt: skip
    total += apart


def feature_moments(s, t, rows, lanes):
    launch = _Launch(s)
    of_rows, of_lanes = launch.shares(rows, MOMENTS, False), launch.shares(lanes, MOMENTS, True)
    moments_kernel[launch.grid](
        s, t, of_rows, of_lanes, *s.shape, *s.stride()[:2], *t.stride()[:2], TILE_ROWS, **launch.options
    )
    _join(rows, of_rows)
    _join(lanes, of_lanes)


def feature_moments_gradient(s, t, upstream, ds, dt, of_lanes):
    launch = _Launch(s)
    for first, (x, y, dx) in enumerate(((s, t, ds), (t, s, dt))):
        if dx is not None:
            moments_gradient_kernel[launch.grid](
                x, y, upstream, dx, first, *s.shape, *x.stride()[:2], *y.stride()[:2], TILE_ROWS, of_lanes != 0,
                **launch.options,
            )  # fmt: skip


def call(backend: str, name: str, x: View, *args: Any) -> None:
    """The entry of this name; the arguments are op.py's."""
    with on(x.tensor.device):
        globals()[name](*(a.materialise() if isinstance(a, View) else a for a in (x, *args)))


def aot_signatures() -> list[dict]:
    """Representative compilations for kdkernels.bench.static."""
    options = {"ROWS": ELEMENTS // MOST_LANES, "LANES": MOST_LANES}
    floats = ("p", "beta", "factor")
    rows = []
    for x in ("fp32", "bf16"):
        pointers = dict.fromkeys(("x", "y", "s", "t", "dx", "ds"), f"*{x}")
        small = {"rows": "*fp32", "lanes": "*fp32"}
        none = dict.fromkeys(
            (
                "row_weight",
                "lane_weight",
                "row_offset",
                "lane_offset",
                "row_magnitude",
                "lane_magnitude",
                "upstream",
                "dt",
            )
        )
        double = {"rows": "*fp64", "lanes": None, "upstream": "*fp64"}
        small["each"] = "*fp64"
        for name, kernel, own, constexprs in (
            ("sums of squares", power_sums_kernel, {**none, **small, "rows": None}, {"EXPONENT": 2, "ODD": False}),
            ("their gradient", power_gradient_kernel, {**none, **small, "rows": None}, {"EXPONENT": 2, "ODD": False}),
            ("match", match_kernel, {**small, **none, "lanes": None}, {"MEASURE": MEASURES.index("squared")}),
            ("weighted match", match_kernel, {**small, **none, "row_weight": "*fp32", "lane_weight": "*fp32",
             "lanes": None}, {"MEASURE": MEASURES.index("squared")}),
            ("focal match", match_kernel, {**small, **none, **dict.fromkeys(FOCAL, "*fp32"), "rows": None, "lanes": None},
             {"MEASURE": MEASURES.index("squared")}),
            ("moments", moments_kernel, double, {}),
            ("their gradient", moments_gradient_kernel, double, {"OF_LANES": False}),
        ):  # fmt: skip
            given = {n: t for n, t in {**pointers, **own}.items() if n in kernel.arg_names}
            constexpr = {**constexprs, **options, **{n: None for n, t in given.items() if t is None}}
            types = {n: given.get(n) or ("fp32" if n in floats else "i32") for n in kernel.arg_names}
            types |= dict.fromkeys(constexpr, "constexpr")
            rows.append({
                "name": f"{name}, {x}", "kernel": kernel, "signature": types, "constexprs": constexpr,
                "divisible": [n for n, t in types.items() if t.startswith("*") or n in DIVISIBLE],
                "num_warps": 4, "num_stages": 3,
            })  # fmt: skip
    flags = {"MEAN": True, "SQUARED": True, "ADD_EPS": False, "LANES": 1024}
    types = dict.fromkeys(compare_kernel.arg_names, "i32") | {
        "s": "*fp32",
        "t": "*fp32",
        "each": "*fp64",
        "eps": "fp32",
    }
    rows.append({
        "name": "comparison of attentions", "kernel": compare_kernel, "signature": types | dict.fromkeys(flags, "constexpr"),
        "constexprs": flags, "divisible": ["s", "t", "each"], "num_warps": 4, "num_stages": 3,
    })  # fmt: skip
    return rows + triton_margin.aot_rows()


FOCAL = ("row_weight", "lane_weight", "row_magnitude", "lane_magnitude")
DIVISIBLE = ("height", "width", "by_batch", "by_row", "s_batch", "s_row", "t_batch", "t_row", "x_batch", "x_row",
             "y_batch", "y_row")  # fmt: skip
