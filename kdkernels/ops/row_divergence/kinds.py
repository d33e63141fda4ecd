"""The divergences that the row kernels know, numbered as in csrc/row_divergence/math.h."""

from __future__ import annotations

import enum


class Kind(enum.IntEnum):
    FORWARD_KL = 0
    REVERSE_KL = 1
    JSD = 2  # p0 = beta, the teacher's share of the mixture
    SKEW_KL = 3  # p0 = the teacher's share of the mixture
    SKEW_REVERSE_KL = 4  # p0 = the student's share of the mixture
    TOTAL_VARIATION = 5
    ALPHA_BETA = 6  # p0 = alpha, p1 = beta
    SOFT_CROSS_ENTROPY = 7  # p0 = the uniform mass mixed into the student, p1 = p0 / V
    SYMMETRIC_KL = 8  # p0 = the forward KL's weight
    DECOUPLED_KL = 9  # p0 = alpha of the label's binary KL, p1 = beta of the other classes' KL


class Inputs(enum.IntEnum):
    """What the two score tensors hold."""

    LOGITS = 0
    LOG_PROBS = 1  # both are log-probabilities
    LOG_PROBS_AND_PROBS = 2  # student log-probabilities, teacher probabilities


# Places in the packed scalars and in the saved statistics of a row.
TEMPERATURE, TEACHER_TEMPERATURE, KD_WEIGHT, CE_WEIGHT, LABEL_SMOOTHING, P0, P1 = range(7)
TOP_S, TOP_T, Z_S, Z_T, Z_1, G_S, G_T, DIVERGENCE = range(8)
STATS = 8
