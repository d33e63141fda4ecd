"""What can be compared of two Gram matrices, and what is normalised before; csrc/gram_match/math.h has the same numbers."""

from __future__ import annotations

import enum


class Kind(enum.IntEnum):
    LINEAR = 0  # squared differences
    SERIES = 1  # of a Gaussian kernel's Taylor series
    ROWS = 2  # of rows of Euclidean length 1
    ROWS_L1 = 3  # of rows whose absolute values sum to 1
    PROBABILITIES = 4  # KL of rows of (c + 1) / 2 that sum to 1
    SIGNED = 5  # squares in the Gram matrix of both models' rows together, weighted 1 / R_s and -1 / R_t
    LENGTHS = 6  # the length of each row of the difference


class Normalize(enum.IntEnum):
    NONE = 0
    CLAMPED = 1  # rows over max(length, eps)
    SHIFTED = 2  # rows over length + eps
    COLUMNS = 3  # columns over max(length, eps)
