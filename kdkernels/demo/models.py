"""A teacher and a student for 8 x 8 images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from kdkernels.demo.data import CLASSES


def teacher() -> nn.Module:
    """A small convolutional network. It has strides for pooling: their gradients repeat bit for bit on every device."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 2 * 2, CLASSES),
    )  # fmt: skip


def student(width: int = 16) -> nn.Module:
    """A perceptron with one narrow hidden layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, CLASSES))


def convolutional_student(width: int = 16) -> nn.Module:
    """One convolution, whose map has the shape of the teacher's second, and one narrow hidden layer."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 4 * 4, width), nn.Tanh(), nn.Linear(width, CLASSES),
    )  # fmt: skip


def features(model: nn.Module, place: str, images: torch.Tensor) -> torch.Tensor:
    """What a sequential model has before its classifier ("embedding"), after its last ReLU of 4 x 4 pixels ("map"), or what
    it says ("scores")."""
    if place == "scores":
        return model(images)
    layers = list(model)  # type: ignore[call-overload]
    x = images
    for layer in layers[:-1]:
        x = layer(x)
        if place == "map" and isinstance(layer, nn.ReLU) and x.shape[2:] == (4, 4):
            return x
    return x


def seeded(make: Callable[[], nn.Module], seed: int, device: torch.device) -> nn.Module:
    """A model whose weights depend on the seed alone; the caller's random numbers stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().to(device)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
