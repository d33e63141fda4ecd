"""Argument checks that every loss shares: clear errors before anything is launched.

Only what is known without looking at a GPU's memory is checked: shapes, dtypes, devices, plain
numbers. Values of CPU tensors are checked too, and with KDKERNELS_DEBUG=1 those of GPU tensors.
"""

from __future__ import annotations

import math
import numbers
import os
from fractions import Fraction
from typing import Any, TypeGuard

import torch

from kdkernels.ops.scalars import Number, readable

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("rowmean", "batchmean", "mean", "sum", "none")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _may_read(x: torch.Tensor) -> bool:
    """Whether values of x can be looked at without a host synchronisation that nobody asked for."""
    return readable(x) and (x.device.type == "cpu" or os.environ.get("KDKERNELS_DEBUG") == "1")


def float_tensor(name: str, x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {_name(x.dtype)}")
    dense(name, x)


def dense(name: str, x: torch.Tensor) -> None:
    if x.layout is not torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor, got {str(x.layout).removeprefix('torch.')}: pass {name}.to_dense()"
        )


def tensors(name: str, x: Any) -> list[torch.Tensor]:
    """One tensor, or those of a sequence."""
    if isinstance(x, torch.Tensor):
        return [x]
    if not isinstance(x, (list, tuple)):
        raise TypeError(f"{name} must be a tensor or a sequence of tensors, got {type(x).__name__}")
    for i, one in enumerate(x):
        if not isinstance(one, torch.Tensor):
            raise TypeError(f"{name}[{i}] must be a tensor, got {type(one).__name__}")
    return list(x)


def real(value: Any) -> bool:
    """Whether it is a plain number: numpy's are; True is none, nor a Fraction, with which torch does not calculate."""
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, Fraction))


def whole(value: Any) -> TypeGuard[int]:
    """Whether it is a plain integer: numpy's are, True is none."""
    return isinstance(value, (int, numbers.Integral)) and not isinstance(value, bool)


def integer(name: str, value: int, *, low: int = -(2**63)) -> int:
    """A plain integer: what was given, or what a number of numpy's is."""
    if not whole(value) and not isinstance(value, torch.SymInt):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not isinstance(value, torch.SymInt) and not low <= value < 2**63:
        least = f"be at least {low}" if value < low != -(2**63) else "fit into 64 bits"
        raise ValueError(f"{name} must {least}, got {value}")
    return value if isinstance(value, (int, torch.SymInt)) else int(value)


def flag(name: str, value: bool) -> None:
    """True or False and nothing like them: a tensor would be asked for its truth, and any word has one."""
    if value is not True and value is not False:
        numpys = "numpy's " if type(value).__module__ == "numpy" else ""  # whose truth values call themselves bool too
        raise TypeError(f"{name} must be True or False, got {numpys}{type(value).__name__}")


def scores(student_name: str, student: torch.Tensor, teacher_name: str, teacher: torch.Tensor, dim: int) -> int:
    """Two floating-point tensors of one shape and device with a class axis; returns that axis, non-negative."""
    float_tensor(student_name, student)
    float_tensor(teacher_name, teacher)
    if student.dim() == 0:
        raise ValueError(f"{student_name} must have a class axis, got a 0-d tensor")
    integer("dim", dim)
    if not -student.dim() <= dim < student.dim():
        raise IndexError(f"dim must be between {-student.dim()} and {student.dim() - 1}, got {dim}")
    dim %= student.dim()
    if student.shape != teacher.shape:
        what = f"{student_name} has shape {tuple(student.shape)} and {teacher_name} {tuple(teacher.shape)}"
        if student.dim() == teacher.dim() and student.shape[dim] != teacher.shape[dim]:
            raise ValueError(f"student and teacher must have the same number of classes: {what}")
        raise ValueError(f"student and teacher must have the same shape: {what}")
    if student.device != teacher.device:
        raise ValueError(
            f"student and teacher must be on one device: {student_name} is on {student.device}, {teacher_name} on {teacher.device}"
        )
    if student.shape[dim] == 0:
        raise ValueError(f"{student_name} must have at least one class, got shape {tuple(student.shape)}")
    return dim


def number(
    name: str,
    value: Number | None,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    learnable: bool = False,
    optional: bool = False,
    plain: bool = False,
    like: torch.Tensor | None = None,
) -> None:
    """A finite number, or a tensor with one element, within [low, high] (or above low); or None where that is a choice.

    Args:
        plain: no tensor.
        like: what the loss is computed from; a tensor is there, or on the CPU.
    """
    if type(value) is float and low < value < high:
        return  # nearly always; not taken for infinities and NaN
    if value is None and optional:
        return
    if isinstance(value, torch.Tensor) and not plain:
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor with one element, got shape {tuple(value.shape)}")
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be a real number, got a tensor of {_name(value.dtype)}")
        dense(name, value)
        if value.requires_grad and not learnable:
            raise ValueError(f"{name} gets no gradient here: pass {name}.detach()")
        if value.device.type != "cpu" and isinstance(like, torch.Tensor) and value.device != like.device:
            raise ValueError(f"{name} must be a number, or a tensor on {like.device} or the CPU, got {value.device}")
        if not _may_read(value):
            return
    elif not real(value) and not isinstance(value, (torch.SymFloat, torch.SymInt)):
        choices = "a number" if plain else "a number or a tensor with one element"
        raise TypeError(f"{name} must be {choices}, got {type(value).__name__}")
    elif torch.compiler.is_compiling():
        return  # a guard on the value would recompile whenever it is annealed
    elif isinstance(value, int):
        integer(name, value)
    x = float(value.detach() if isinstance(value, torch.Tensor) else value)
    if not math.isfinite(x) or not (low < x if open_low else low <= x) or x > high:
        if open_low and low == 0 and high == math.inf:
            raise ValueError(f"{name} must be positive, got {x:g}")
        bounds = (
            f"{'above' if open_low else 'at least'} {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        )
        raise ValueError(f"{name} must be {'finite' if low == -math.inf else bounds}, got {x:g}")


def plain_number(name: str, value: float | None, **bounds: Any) -> None:
    """A number that reaches the kernels by value."""
    number(name, value, plain=True, **bounds)


def temperatures(
    temperature: Number, teacher_temperature: Number | None, like: torch.Tensor, *, learnable: bool = False
) -> None:
    """Positive ones; the teacher's may be None, the student's."""
    number("temperature", temperature, low=0, open_low=True, learnable=learnable, like=like)
    number(
        "teacher_temperature", teacher_temperature, low=0, open_low=True, learnable=learnable, optional=True, like=like
    )


def items(num_items: Number | None, like: torch.Tensor | None = None) -> None:
    """A divisor: positive, or a tensor, which is 0 where no rank has any token."""
    number("num_items", num_items, low=0, open_low=not isinstance(num_items, torch.Tensor), optional=True, like=like)


def choice(name: str, value: str, options: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(map(repr, options))}")


def _beside_scores(
    name: str,
    x: torch.Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    what: str = "the shape of the scores without the class axis,",
) -> None:
    """A dense tensor of this shape on the scores' device."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    dense(name, x)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have {what} {shape}; got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device} with the scores, got {x.device}")


def integers(name: str, x: torch.Tensor | None, rows: tuple[int, ...], device: torch.device) -> torch.Tensor | None:
    """A label of every row, whichever."""
    if x is None:
        return None
    _beside_scores(name, x, rows, device)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must hold class indices (int64), got {_name(x.dtype)}")
    return x


def labels_of(
    labels: torch.Tensor | None, rows: tuple[int, ...], classes: int, ignore_index: int, device: torch.device,
    name: str = "labels", look: bool = True,
) -> torch.Tensor | None:  # fmt: skip
    """Labels of every row, as int64; without `look` their values are left to `within`, or to a kernel."""
    integer("ignore_index", ignore_index)
    labels = integers(name, labels, rows, device)
    if labels is None:
        return None
    labels = labels.long()
    if look:
        within(name, labels, classes, ignore_index)
    return labels


def within(name: str, labels: torch.Tensor, classes: int, ignore_index: int) -> None:
    """That labels are classes or ignored, where their values are at hand."""
    if labels.numel() and _may_read(labels):
        low, high = (int(v) for v in labels.aminmax())
        if low < 0 or high >= classes:  # or ignored: the look that costs more
            bad = labels[(labels != ignore_index) & ((labels < 0) | (labels >= classes))]
            if bad.numel():
                raise IndexError(
                    f"{name} hold {bad[0]}, outside 0 to {classes - 1} and not ignore_index ({ignore_index})"
                )


def per_row(name: str, x: torch.Tensor | None, rows: tuple[int, ...], device: torch.device) -> torch.Tensor | None:
    """Weights of every row; a boolean mask becomes zeros and ones."""
    if x is None:
        return None
    _beside_scores(name, x, rows, device)
    if x.is_complex():
        raise TypeError(f"{name} must be real numbers, got {_name(x.dtype)}")
    if x.requires_grad:
        raise ValueError(f"{name} gets no gradient here: pass {name}.detach(), or use reduction='none'")
    return x


def per_class(name: str, x: torch.Tensor | None, classes: int, device: torch.device) -> torch.Tensor | None:
    """Weights of every class."""
    if x is None:
        return None
    float_tensor(name, x)
    _beside_scores(name, x, (classes,), device, "one value a class, shape")
    if x.requires_grad:
        raise ValueError(f"{name} gets no gradient here: pass {name}.detach()")
    return x


def maps(name: str, x: torch.Tensor) -> torch.Tensor:
    """Feature maps as (N, C, L), L their positions."""
    float_tensor(name, x)
    if x.dim() < 3:
        raise ValueError(f"{name} must be feature maps, (N, C, H, W) or (N, C, ...); got shape {tuple(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"{name} must have at least one channel and one position, got shape {tuple(x.shape)}")
    return x.flatten(2)


def same_device(**tensors: torch.Tensor) -> None:
    """All on the first one's device."""
    (first, x), *others = tensors.items()
    for name, y in others:
        if y.device != x.device:
            raise ValueError(
                f"{first} and {name} must be on one device: {first} is on {x.device}, {name} on {y.device}"
            )


def indices(name: str, x: torch.Tensor, size: int, padding: int | None = None) -> None:
    """Places in a table of `size` entries; `padding`, at most 0, stands for none."""
    dense(name, x)
    if x.numel() and _may_read(x):
        low, high = (int(v) for v in x.aminmax())
        least = 0 if padding is None else padding
        if low < least or high >= size:
            places = f"from 0 to {size - 1}" if padding is None else f"from 0 to {size - 1}, or {padding}"
            raise IndexError(f"{name} must be {places}; got {low if low < least else high}")


def positive(name: str, x: torch.Tensor) -> None:
    if x.numel() and _may_read(x) and not bool((x > 0).all()):
        raise ValueError(f"{name} must be positive, got {x.tolist()}")


def boxes(name: str, x: torch.Tensor, *, padded: bool) -> None:
    """Corners x1, y1, x2, y2; in a padded tensor a row with x2 < x1 or y2 < y1 is no box."""
    if x.numel() and _may_read(x):
        wrong = x.isnan() if padded else ~(x[..., 2:] >= x[..., :2])  # so of NaN too
        if wrong.any():
            what = "numbers" if padded else "x1, y1, x2, y2, with x1 <= x2 and y1 <= y2"
            raise ValueError(f"{name} must be {what}; got {x[wrong.any(-1)][0].tolist()}")


def embeddings(
    student: torch.Tensor, teacher: torch.Tensor, names: tuple[str, str] = ("student", "teacher")
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of the same samples; returns both as (N, D), D their own."""
    for name, x in zip(names, (student, teacher)):
        float_tensor(name, x)
        if x.dim() < 2:
            raise ValueError(
                f"{name} must have a sample axis and features, (N, D) or (N, ...); got shape {tuple(x.shape)}"
            )
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student and teacher must hold the same samples: {names[0]} has {student.shape[0]} and {names[1]} {teacher.shape[0]}"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"student and teacher must be on one device: {names[0]} is on {student.device}, {names[1]} on {teacher.device}"
        )
    return _features_of(names[0], student), _features_of(names[1], teacher)


def _features_of(name: str, x: torch.Tensor) -> torch.Tensor:
    features = x.shape[1:].numel()
    if features == 0:
        raise ValueError(f"{name} must have at least one feature, got shape {tuple(x.shape)}")
    return x if x.dim() == 2 else x.reshape(x.shape[0], features)
