"""Ways of training with a teacher, in pieces that fit any training loop.

Each piece is plain PyTorch over this package's losses: it holds models or makes a loss of scores, and never an optimizer
or a loop of its own, so that it fits Lightning, Accelerate or a Trainer of Hugging Face as well as twenty lines by hand.
"""

from kdkernels.schemes.early_exit import EarlyExitNetwork, self_distillation_loss
from kdkernels.schemes.ema import EMATeacher, TemporalEnsemble
from kdkernels.schemes.generations import average_logits, born_again, distill_chain, frozen
from kdkernels.schemes.gradients import scale_gradient
from kdkernels.schemes.mutual import collaborative_loss, ensemble_logits, mutual_learning_loss
from kdkernels.schemes.schedules import Constant, Cosine, Linear, confidence_weight
from kdkernels.schemes.sequences import TeacherSequences
from kdkernels.schemes.snapshots import LearningWithoutForgetting, SnapshotTeacher, anchor_distillation_loss
from kdkernels.schemes.synthetic import synthetic_batch
from kdkernels.schemes.temperatures import LearnableTemperature, by_capacity, capacity_gap
from kdkernels.schemes.unlabelled import semi_supervised_loss

__all__ = [
    "Constant",
    "Cosine",
    "EMATeacher",
    "EarlyExitNetwork",
    "LearnableTemperature",
    "LearningWithoutForgetting",
    "Linear",
    "SnapshotTeacher",
    "TeacherSequences",
    "TemporalEnsemble",
    "anchor_distillation_loss",
    "average_logits",
    "born_again",
    "by_capacity",
    "capacity_gap",
    "collaborative_loss",
    "confidence_weight",
    "distill_chain",
    "ensemble_logits",
    "frozen",
    "mutual_learning_loss",
    "scale_gradient",
    "self_distillation_loss",
    "semi_supervised_loss",
    "synthetic_batch",
]
