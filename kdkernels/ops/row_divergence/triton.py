"""Launching the Triton kernels: block choices, and the same entry points as the compiled extension."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from kdkernels.native import View
from kdkernels.ops.row_divergence.kinds import Inputs, Kind
from kdkernels.ops.row_divergence.triton_counts import count_kernel, sum_kernel
from kdkernels.ops.row_divergence.triton_looped import backward_kernel, looped_kernel
from kdkernels.ops.row_divergence.triton_resident import resident_kernel
from kdkernels.ops.triton_util import on, power

# Longest row that stays in registers with its class axis contiguous, or strided. See README.md for the measurements.
RESIDENT_ROWS = 8192
RESIDENT_COLUMNS = 256
TILE = 2048  # elements a program holds of each tensor at a time: 8 a thread leave room for three programs a processor
ALONE = 4096  # a problem of so many elements is one program, and its total part of the same launch
COUNTED_IN_PLACE = 4096  # up to so many rows every program counts the divisors for itself
PARTS = 256  # programs that share a count or a total of many rows
BLOCK = 1024


class Plan(NamedTuple):
    """A tile of R rows by C classes, by so many warps; resident where C holds the whole class axis."""

    R: int
    C: int
    warps: int
    resident: bool


def plan(classes: int, rows: int, inner: int, strided: bool, simple: bool = True) -> Plan:
    """Tile of a launch. rows: of the whole problem; inner: rows that one program can span; simple: only KL is built in."""
    C = power(classes)
    # All formulas together leave registers for half as long a row.
    resident = classes <= (RESIDENT_COLUMNS if strided else RESIDENT_ROWS if simple else RESIDENT_ROWS // 2)
    if strided:
        # At least 16 neighbouring rows, so that a load fills its sectors of 32 bytes.
        C = C if resident else 32
        R = min(max(TILE // C, 16), 256)
    else:
        C = C if resident else TILE
        R = power(rows) if rows * C <= ALONE else max(TILE // C, 1)
    R = min(R, power(inner))
    # A strided tile needs an address an element: more registers, so fewer threads.
    warps = min(max(R * C // 256, 1), 8 if strided else 16)
    return Plan(R, C, warps, resident)


class _Rows(NamedTuple):
    """The common shape of all score tensors, and each one's (outer, class, inner) strides."""

    outer: int
    classes: int
    inner: int
    strides: list[tuple[int, int, int]]
    strided: bool


def _rows(tensors: tuple[Any, ...]) -> _Rows:
    """Merges outer and inner into one row axis where the strides of every tensor allow it."""
    outer, classes, inner = tensors[0].shape
    strides = [_strides(x) for x in tensors]
    if inner == 1:
        outer, inner = 1, outer
        strides = [(0, c, o) for o, c, i in strides]
    elif outer == 1 or all(o == i * inner for o, c, i in strides):
        outer, inner = 1, outer * inner
        strides = [(0, c, i) for o, c, i in strides]
    given = [c for x, (o, c, i) in zip(tensors, strides, strict=True) if x is not None]
    return _Rows(outer, classes, inner, strides, classes > 1 and any(c != 1 for c in given))


def _strides(x: Any) -> tuple[int, int, int]:
    if x is None:
        return 0, 0, 0
    return x.stride if isinstance(x, View) else x.stride()


def _tensor(x: Any) -> Any:
    return x.tensor if isinstance(x, View) else x


def _vector(x: Any) -> Any:
    x = _tensor(x)
    return x if x is None or x.is_contiguous() else x.contiguous()


def _scalars(scalars: torch.Tensor, on_device: bool | None) -> tuple[Any, list[float]]:
    """(pointer or None, values): numbers go by value, a tensor on a GPU is read by the kernel."""
    if on_device if on_device is not None else scalars.device.type != "cpu":
        return scalars, [0.0] * 7
    return None, scalars.tolist()[:7]


def _simple(kind: int, inputs: int) -> bool:
    if kind > Kind.DECOUPLED_KL:
        raise NotImplementedError(f"the Triton kernels do not know the divergence {Kind(kind).name}")
    return kind in (Kind.FORWARD_KL, Kind.REVERSE_KL, Kind.DECOUPLED_KL) and inputs == Inputs.LOGITS


def _without_label(kind: int, inputs: int, labels: Any) -> bool:
    """Whether the label's class stands apart from the others."""
    if kind != Kind.DECOUPLED_KL:
        return False
    if inputs != Inputs.LOGITS:
        raise ValueError("row_divergence: a decoupled KL takes logits only")
    if labels is None:
        raise ValueError("row_divergence: a decoupled KL needs labels")
    return True


def forward(
    student: Any,
    teacher: Any,
    labels: Any,
    weight: Any,
    class_weight: Any,
    scalars: torch.Tensor,
    divisors: Any,
    losses: Any,
    total: Any,
    stats: Any,
    ds: Any,
    dt: Any,
    kind: int,
    inputs: int,
    hard: int,
    count: int,
    ignore_index: int,
    scalars_on_device: bool | None = None,
) -> None:
    """The entry row_divergence_forward. Arguments as in native.py, less the context."""
    s, t, ds_, dt_, divisors, losses, total, stats = map(
        _tensor, (student, teacher, ds, dt, divisors, losses, total, stats)
    )
    labels, weight, class_weight = map(_vector, (labels, weight, class_weight))
    outer, V, inner, strides, strided = _rows((student, teacher, ds, dt))
    rows = outer * inner
    pointer, values = _scalars(scalars, scalars_on_device)
    R, C, warps, resident = plan(V, rows, inner, strided, _simple(kind, inputs))
    count = count if divisors is not None else 0
    others = _without_label(kind, inputs, labels)
    with on(s.device):
        if rows == 0:
            _empty(divisors, total, count)
            return
        counted = resident and rows <= COUNTED_IN_PLACE
        if count and not counted:
            _count(labels, weight, class_weight if hard else None, divisors, rows, V, ignore_index, count)
        blocks = triton.cdiv(inner, R)
        programs = outer * blocks
        flat = [x for stride in strides for x in stride]
        if resident:
            resident_kernel[(programs,)](
                s, t, labels, weight, class_weight, pointer, divisors, losses, total if programs == 1 else None,
                stats, None, ds_, dt_, None, *values, inner, V, 0, *flat, kind, inputs, ignore_index, blocks,
                count if counted else 0, rows,
                R=R, C=C, B=BLOCK, HARD=bool(hard), SIMPLE=_simple(kind, inputs), OTHERS=others, COLUMNS=strided,
                num_warps=warps,
            )  # fmt: skip
        else:
            again = ds is not None or dt is not None or not _simple(kind, inputs)
            looped_kernel[(programs,)](
                s, t, labels, weight, class_weight, pointer, divisors, losses, stats, ds_, dt_, *values, inner, V,
                *flat, kind, inputs, ignore_index, blocks,
                R=R, C=C, HARD=bool(hard), SIMPLE=_simple(kind, inputs), OTHERS=others, COLUMNS=strided,
                FIRST="evict_last" if again else "evict_first", num_warps=warps,
            )  # fmt: skip
        if total is not None and not (resident and programs == 1):
            _sum(losses, total, rows)


def backward(
    student: Any,
    teacher: Any,
    labels: Any,
    weight: Any,
    class_weight: Any,
    scalars: torch.Tensor,
    divisors: Any,
    stats: Any,
    upstream: Any,
    ds: Any,
    dt: Any,
    temperature_grad: Any,
    kind: int,
    inputs: int,
    hard: int,
    ignore_index: int,
    scalars_on_device: bool | None = None,
) -> None:
    """The entry row_divergence_backward. Arguments as in native.py, less the context."""
    s, t, ds_, dt_, divisors, stats, temperature_grad = map(
        _tensor, (student, teacher, ds, dt, divisors, stats, temperature_grad)
    )
    labels, weight, class_weight, upstream = map(_vector, (labels, weight, class_weight, upstream))
    others = _without_label(kind, inputs, labels)
    outer, V, inner, strides, strided = _rows((student, teacher, ds, dt))
    if outer * inner == 0:
        return
    pointer, values = _scalars(scalars, scalars_on_device)
    R, C, warps, resident = plan(V, outer * inner, inner, strided, _simple(kind, inputs))
    blocks = triton.cdiv(inner, R)
    flat = [x for stride in strides for x in stride]
    up = int(upstream.numel() > 1)
    with on(s.device):
        if resident:
            resident_kernel[(outer * blocks,)](
                s, t, labels, weight, class_weight, pointer, divisors, None, None, None, upstream, ds_, dt_,
                temperature_grad, *values, inner, V, up, *flat, kind, inputs, ignore_index, blocks, 0, 0,
                R=R, C=C, B=BLOCK, HARD=bool(hard), SIMPLE=_simple(kind, inputs), OTHERS=others, COLUMNS=strided,
                num_warps=warps,
            )  # fmt: skip
            return
        backward_kernel[(outer * blocks,)](
            s, t, labels, weight, class_weight, pointer, divisors, stats, upstream, ds_, dt_, temperature_grad,
            *values, inner, V, up, *flat, kind, inputs, ignore_index, blocks,
            R=R, C=C, HARD=bool(hard), SIMPLE=_simple(kind, inputs), OTHERS=others, COLUMNS=strided, num_warps=warps,
        )  # fmt: skip


def _empty(divisors: Any, total: Any, count: int) -> None:
    if total is not None:
        total.zero_()
    for bit in (0, 1):
        if count & (1 << bit):
            divisors.reshape(-1)[bit].zero_()


def _parts(rows: int) -> int:
    return 1 if rows <= 32 * BLOCK else PARTS


def _count(labels: Any, weight: Any, cw: Any, divisors: Any, rows: int, V: int, ignore_index: int, count: int) -> None:
    parts = _parts(rows)
    if parts == 1:
        count_kernel[(1,)](labels, weight, cw, divisors, rows, V, ignore_index, count, BLOCK, B=BLOCK, FINAL=True)
        return
    partial = divisors.new_empty(2 * parts)
    count_kernel[(parts,)](
        labels, weight, cw, partial, rows, V, ignore_index, count, parts * BLOCK, B=BLOCK, FINAL=False
    )
    for bit in (0, 1):
        if count & (1 << bit):
            sum_kernel[(1,)](partial[bit * parts :], divisors[bit:], parts, BLOCK, B=BLOCK)


def _sum(losses: torch.Tensor, total: torch.Tensor, rows: int) -> None:
    parts = _parts(rows)
    if parts > 1:
        partial = losses.new_empty(parts)
        sum_kernel[(parts,)](losses, partial, rows, parts * BLOCK, B=BLOCK)
        losses, rows = partial, parts
    sum_kernel[(1,)](losses, total, rows, BLOCK, B=BLOCK)


def _compiled(
    name: str, kernel: Any, p: Plan, dtype: str, grads: str, strided: bool, full: bool, hard: bool, others: bool = False
) -> dict:
    """One compilation of a row kernel, as a launch on long or short rows with aligned strides makes it."""
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= dict.fromkeys(("student", "teacher"), f"*{dtype}")
    types |= {n: f"*{dtype}" for n, want in (("ds", "s"), ("dt", "t")) if want in grads}
    types |= dict.fromkeys(("losses", "stats", "divisors", "upstream"), "*fp32")
    types |= dict.fromkeys(("ts", "tt", "kd", "ce", "eps", "p0", "p1"), "fp32")
    constexprs: dict[str, Any] = {"R": p.R, "C": p.C, "B": BLOCK, "HARD": hard, "SIMPLE": not full, "OTHERS": others}
    constexprs |= {"COLUMNS": strided, "FIRST": "evict_last"}
    constexprs |= dict.fromkeys(("weight", "class_weight", "scalars", "total", "temperature_grad"))
    constexprs |= {n: None for n, want in (("ds", "s"), ("dt", "t")) if want not in grads}
    constexprs |= {f"{x}_{'i' if strided else 'c'}": 1 for x in ("s", "t", "ds", "dt")}
    if hard or others:
        types["labels"] = "*i64"
    else:
        constexprs["labels"] = None
    if kernel is resident_kernel:
        constexprs["upstream"] = None
    types = {n: "constexpr" if n in constexprs else types[n] for n in kernel.arg_names}
    loose = ("kind", "inputs", "ignore_index", "blocks", "count", "rows", "up")
    return {
        "name": name,
        "kernel": kernel,
        "signature": types,
        "constexprs": {n: v for n, v in constexprs.items() if n in types},
        "divisible": [n for n, k in types.items() if k not in ("constexpr", "fp32") and n not in loose],
        "num_warps": p.warps,
        "num_stages": 3,
    }


def aot_signatures() -> list[dict]:
    """Representative compilations for kdkernels.bench.static."""
    looped, resident, backward_ = looped_kernel, resident_kernel, backward_kernel
    long_, short, small = plan(32000, 8192, 8192, False), plan(8192, 8192, 8192, False), plan(100, 64, 64, False)
    half = plan(4096, 8192, 8192, False, False)
    image, wide_image = plan(19, 16384, 8192, True), plan(1000, 16384, 8192, True)
    rows = [
        ("looped KL", looped, long_, "bf16", "s", False, False, False),
        ("looped KL, f32", looped, long_, "fp32", "s", False, False, False),
        ("looped KL, both gradients", looped, long_, "bf16", "st", False, False, False),
        ("looped CE + KL", looped, long_, "bf16", "s", False, False, True),
        ("looped any kind", looped, long_, "bf16", "s", False, True, False),
        ("looped any kind, both gradients, f32", looped, long_, "fp32", "st", False, True, False),
        ("looped backward KL", backward_, long_, "fp16", "s", False, False, False),
        ("looped backward any kind", backward_, long_, "fp16", "st", False, True, False),
        ("looped decoupled KL", looped, long_, "bf16", "st", False, False, True, True),
        ("looped backward decoupled KL", backward_, long_, "fp16", "st", False, False, True, True),
        ("8192 KL", resident, short, "bf16", "s", False, False, False),
        ("8192 CE + KL, f32", resident, short, "fp32", "s", False, False, True),
        ("4096 any kind", resident, half, "bf16", "s", False, True, False),
        ("4096 any kind, both gradients, f32", resident, half, "fp32", "st", False, True, False),
        ("8192 decoupled KL, f32", resident, short, "fp32", "s", False, False, True, True),
        ("64x100 CE + KL", resident, small, "fp32", "s", False, False, True),
        ("NCHW 19 KL", resident, image, "bf16", "s", True, False, False),
        ("NCHW 150 CE + KL", resident, plan(150, 16384, 8192, True), "bf16", "st", True, False, True),
        ("NCHW 1000 KL", looped, wide_image, "bf16", "s", True, False, False),
    ]
    return [_compiled(*row) for row in rows]
