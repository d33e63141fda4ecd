"""Cases of the losses between feature maps for tests, bench and check."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from kdkernels.losses import features
from kdkernels.ops.registry import Case, Shape, Spec

F32, BF16 = torch.float32, torch.bfloat16
SHAPES: tuple[Shape, ...] = ((2, 3, 5, 7), (1, 1, 1, 1), (3, 9, 2, 2), (2, 130, 3, 11), (1, 5, 33, 40))
TOKENS: tuple[Shape, ...] = ((2, 5, 7), (1, 1, 1), (3, 4, 129), (2, 131, 6))
BENCH = {"cifar": (64, 64, 32, 32), "cifar, 256 channels": (64, 256, 8, 8), "imagenet": (64, 256, 14, 14),
         "imagenet, 512 channels": (256, 512, 7, 7), "detection": (2, 256, 100, 168)}  # fmt: skip
BENCH_GPU = {"imagenet, 64 channels": (256, 64, 56, 56), "imagenet": (256, 256, 14, 14),
             "imagenet, 512 channels": (256, 512, 7, 7), "detection": (2, 256, 100, 168)}  # fmt: skip
PAIR = ("student_features", "teacher_features")


def make_features(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape, generator=generator) for name in PAIR}


def make_channels_last(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        name: x.contiguous(memory_format=torch.channels_last) for name, x in make_features(shape, generator).items()
    }


def make_wider_teacher(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A teacher with more channels."""
    n, channels, *rest = shape
    wide = (n, channels * 3 // 2 + 1, *rest)
    return {"student_features": torch.randn(shape, generator=generator),
            "teacher_features": torch.randn(wide, generator=generator)}  # fmt: skip


def eager_hint(student_features: torch.Tensor, teacher_features: torch.Tensor, **_: Any) -> torch.Tensor:
    return F.mse_loss(student_features, teacher_features)


def eager_attention(student_features: torch.Tensor, teacher_features: torch.Tensor, **_: Any) -> torch.Tensor:
    """The authors' lines."""

    def at(x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))

    return (at(student_features) - at(teacher_features)).pow(2).mean()


def eager_channel_attention(student_features: torch.Tensor, teacher_features: torch.Tensor, **_: Any) -> torch.Tensor:
    def at(x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x.pow(2).mean((2, 3)))

    return (at(student_features) - at(teacher_features)).pow(2).mean()


def floor_bytes(shape: Shape, itemsize: int, backward: bool) -> int:
    """Read both maps, write the student's gradient."""
    return math.prod(shape) * itemsize * (3 if backward else 2)


def _case(
    name: str, function: Callable[..., torch.Tensor], eager: Any = None, make: Any = make_features,
    shapes: tuple[Shape, ...] = SHAPES, bench: bool = False, grads: tuple[str, ...] = PAIR, **options: Any,
) -> Case:  # fmt: skip
    return Case(
        name, function, make, options, eager, grads=grads, shapes=shapes, bench=BENCH if bench else {},
        bench_gpu=BENCH_GPU if bench else {}, floor_bytes=floor_bytes, bench_dtypes=(F32, BF16), headline=bench,
    )  # fmt: skip


SPEC = Spec(
    family="weighted_match",
    backends=("reference", "cpu", "triton"),
    cases=(
        _case("hint", features.hint_loss, eager_hint, bench=True),
        _case("hint-channels-last", features.hint_loss, make=make_channels_last),
        _case("hint-absolute", features.hint_loss, measure="absolute", reduction="sum"),
        _case("hint-smooth-l1", features.hint_loss, shapes=TOKENS, measure="smooth_l1", beta=0.5, dim=-1),
        _case("hint-normalized", features.hint_loss, shapes=(SHAPES[0], *SHAPES[2:]), normalize=True, reduction="batchmean"),
        _case("attention_transfer", features.attention_transfer_loss, eager_attention, bench=True),
        _case("attention_transfer-channels-last", features.attention_transfer_loss, make=make_channels_last),
        _case("attention_transfer-p1", features.attention_transfer_loss, make=make_wider_teacher, p=1.0, distance="norm"),
        _case("attention_transfer-p3", features.attention_transfer_loss, p=3.0, signed=True),
        _case("attention_transfer-p4", features.attention_transfer_loss, shapes=TOKENS, p=4.0, dim=-1, channels="sum",
              eps=1e-6, add_eps=True),
        _case("attention_transfer-p1.5", features.attention_transfer_loss, p=1.5),
        _case("channel_attention_transfer", features.channel_attention_transfer_loss, eager_channel_attention),
    ),
)  # fmt: skip
