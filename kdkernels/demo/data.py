"""Scikit-learn's handwritten digits: 1797 images of 8 x 8, which come with the package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

CLASSES = 10


class Digits(NamedTuple):
    """Images (n, 1, 8, 8) in [0, 1] and labels; the held-out quarter is never trained on."""

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    def to(self, device: torch.device | str) -> Digits:
        return Digits(*(x.to(device) for x in self))


def digits(seed: int, held_out: float = 0.25) -> Digits:
    """The digits, split at random with equal shares of every class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=held_out, stratify=labels, random_state=seed % 2**32)
    train_x, test_x = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for x in parts[:2])
    train_y, test_y = (torch.tensor(y, dtype=torch.int64) for y in parts[2:])
    return Digits(train_x, train_y, test_x, test_y)


def few_of_each(labels: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Indices of `count` random samples of every class."""
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat([order[labels[order] == c][:count] for c in range(CLASSES)])


def batches(n: int, size: int, epochs: int, generator: torch.Generator) -> Iterator[tuple[int, torch.Tensor]]:
    """(epoch, indices) over `epochs` shuffles of n samples; the last batch of an epoch may be smaller."""
    for epoch in range(epochs):
        for indices in torch.randperm(n, generator=generator).split(size):
            yield epoch, indices
