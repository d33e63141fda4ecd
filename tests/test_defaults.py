"""What a loss does unasked is what its paper, or its authors' code, says."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import kdkernels as kd
from kdkernels import schemes

PUBLISHED: dict[Any, dict[str, Any]] = {
    kd.kl_div: {"temperature": 1.0, "scale_by_t2": True, "ignore_index": -100, "reduction": "rowmean"},
    kd.distillation_loss: {"temperature": 4.0, "alpha": 0.9, "divergence": "forward_kl", "label_smoothing": 0.0},
    kd.linear_distillation_loss: {"temperature": 4.0, "alpha": 0.9, "scale_by_t2": True},
    kd.symmetric_kl_div: {"ratio": 0.5},
    kd.generalized_js_div: {"beta": 0.5},
    kd.skew_kl_div: {"skew": 0.1},  # DistiLLM
    kd.skew_reverse_kl_div: {"skew": 0.1},
    kd.decoupled_kd_loss: {"temperature": 4.0, "alpha": 1.0, "beta": 8.0, "warmup_epochs": 20.0},
    kd.channel_wise_div: {"temperature": 4.0, "scale_by_t2": True, "reduction": "rowmean"},
    kd.lwf_loss: {"temperature": 2.0, "uniform": 1e-5},
    kd.auxiliary_heads_loss: {"temperature": 3.0, "alpha": 0.1, "beta": 1e-6},  # be your own teacher
    kd.dist_loss: {"temperature": 1.0, "beta": 1.0, "gamma": 1.0, "scale_by_t2": False, "eps": 1e-8, "clamp_norms": False},
    kd.mutual_kl_div: {"temperature": 1.0, "pairs": "paper"},
    kd.topk_div: {"missing": "renormalize", "divergence": "forward_kl", "temperature": 1.0},
    kd.uld_loss: {"temperature": 1.0, "scale_by_t2": False},
    kd.hint_loss: {"measure": "squared", "reduction": "mean", "normalize": False},
    kd.attention_transfer_loss: {"p": 2.0, "signed": False, "distance": "squared", "pool": True},
    kd.variational_information_loss: {"eps": 1e-5},
    kd.pearson_feature_loss: {"eps": 1e-6},
    kd.hierarchical_context_loss: {"levels": (4, 2, 1)},
    kd.fgd_loss: {
        "temperature": 0.5, "foreground_weight": 1e-3, "background_weight": 5e-4, "attention_weight": 1e-3, "global_weight": 5e-6,
    },
    kd.margin_ranking_loss: {"margin": 1.0, "wrong": "all"},
    kd.rkd_distance_loss: {"squared": False, "mean_normalize": True, "beta": 1.0, "eps": 1e-12, "normalize": False},
    kd.rkd_loss: {"distance_weight": 1.0, "angle_weight": 2.0},
    kd.hard_dark_rank_loss: {"alpha": 3.0, "beta": 3.0, "k": 4},
    kd.instance_relation_graph_loss: {"vertex_weight": 0.1, "edge_weight": 5.0, "transformation_weight": 5.0, "squared": True},
    kd.similarity_preserving_loss: {"norm": "l2", "reduction": "mean"},
    kd.correlation_congruence_loss: {"kernel": "gaussian", "gamma": 0.4, "order": 2, "normalize": True, "distance": "squared"},
    kd.pkt_loss: {"eps": 1e-7},
    kd.nst_loss: {"detach_teacher_term": True},
    kd.fsp_loss: {"pool": "avg", "distance": "squared"},
    kd.pairwise_structure_loss: {"pool": 0.5, "detach_norm": True},
    kd.cross_image_relation_loss: {"temperature": 0.1, "pool": None},
    kd.local_structure_loss: {"kernel": "rbf", "gamma": 0.005, "degree": 2, "reduction": "nodes", "divergence": "kl"},
    kd.compress_loss: {"temperature": 0.04, "teacher_temperature": None, "scale_by_t2": False},
    kd.seed_loss: {"temperature": 0.2, "teacher_temperature": 1e-4, "scale_by_t2": False},
    kd.info_nce_distillation_loss: {"temperature": 0.07, "symmetric": False},
    kd.crd_loss: {"temperature": 0.07, "eps": 1e-7},
    schemes.EMATeacher: {"decay": 0.999, "warmup": 2.0, "buffers": "copy"},
    schemes.TemporalEnsemble: {"momentum": 0.6},
    schemes.LearnableTemperature: {"low": 1.0, "high": 21.0, "adversarial": True},  # CTKD
    schemes.mutual_learning_loss: {"weight": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("function", PUBLISHED, ids=lambda f: f.__name__)
def test_defaults_are_the_published_ones(function: Any) -> None:
    arguments = inspect.signature(function).parameters
    assert {name: arguments[name].default for name in PUBLISHED[function]} == PUBLISHED[function]
