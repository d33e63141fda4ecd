"""The compiled extension, and how a torch tensor is described to it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch  # before _C: both use libgomp, and torch's copy must be the one that is loaded

try:
    from kdkernels import _C
except ImportError as error:
    _C = None
    _import_error: str | None = str(error)
else:
    _import_error = None

if _C is not None:
    _C.dtypes.update({
        torch.float32: 0,
        torch.float16: 1,
        torch.bfloat16: 2,
        torch.int64: 3,
        torch.int32: 4,
        torch.uint8: 5,
        torch.bool: 5,
        torch.int8: 5,  # a byte
        torch.float64: 6,
    })  # fmt: skip


def _is_one(x: torch.Tensor) -> bool:
    """Whether a CPU tensor's one element is 1, in float32 or float64."""
    return x.item() == 1


is_one: Callable[[torch.Tensor], bool] = _is_one if _C is None else _C.is_one


class View(NamedTuple):
    """A tensor seen with other sizes and strides, from its own first element. No torch view is made."""

    tensor: torch.Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # in elements

    def materialise(self) -> torch.Tensor:
        """The same as a torch view."""
        return self.tensor.as_strided(self.shape, self.stride, self.tensor.storage_offset())


class NativeLibrary:
    """The entry points of one target ("cpu" or "cuda") of the compiled extension."""

    def __init__(self, target: str):
        self.target = target
        self._entries: dict[str, Any] = getattr(_C, target) if _C is not None else {}
        if _C is not None:
            # call(name, ...) runs an entry; no method of ours, whose frame small kernels would feel.
            self.call = functools.partial(_C.call, self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __bool__(self) -> bool:
        return bool(self._entries)

    def context(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """The trailing arguments of an entry: threads on CPU; device and stream on CUDA."""
        if self.target == "cpu":
            return (torch.get_num_threads(),)
        index = tensor.device.index
        return index, torch.cuda.current_stream(index).cuda_stream


def build_info() -> dict[str, str]:
    """What the build could not make, and why: keys "native", "cuda", "openmp"; "cuda_archs" when it could."""
    path = Path(__file__).with_name("_build_info.json")
    info = json.loads(path.read_text()) if path.exists() else {}
    if _import_error is not None:
        info.setdefault("native", f"kdkernels._C could not be loaded: {_import_error}")
    return info


def cpu_target() -> str:
    """The instruction set the CPU kernels run with, e.g. "cpu.x86-64-v4"."""
    return _C.cpu_target if _C is not None else ""
