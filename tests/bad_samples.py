"""What every loss between the samples of two batches refuses, and in which words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


def refuses_bad_samples(
    function: Callable[..., torch.Tensor], s: torch.Tensor, t: torch.Tensor, *, positive: str
) -> None:
    """Of five samples; `positive` is the name of a number that must be."""
    bad = (
        (ValueError, "student has 5 and teacher 4", (s, t[:4]), {}),
        (ValueError, "sample axis", (s[0], t), {}),
        (ValueError, "at least one feature", (s[:, :0], t), {}),
        (TypeError, "teacher must be float16", (s, t.long()), {}),
        (ValueError, "unknown reduction", (s, t), {"reduction": "rowmean"}),
        (ValueError, f"{positive} must be positive, got 0", (s, t), {positive: 0.0}),
    )
    for error, words, tensors, options in bad:
        with pytest.raises(error, match=words):
            function(*tensors, **options)
