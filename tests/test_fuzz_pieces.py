"""Wrong arguments to what is public beside the losses: schemes, features, distributed functions and modules' constructors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from wrong import hints_of, replacements, takes, trouble

import kdkernels
from kdkernels import distributed, features, schemes
from kdkernels.losses.module import LossModule

Example = tuple[Callable[..., Any], dict[str, Any]]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5)).eval()


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (4, 5)), generator=torch.Generator().manual_seed(0))


def labels() -> torch.Tensor:
    return torch.tensor([0, 1, 2, 4])


def tokens() -> torch.Tensor:
    return torch.tensor([[1, 2, 3], [2, 3, 1]])


def written() -> schemes.TeacherSequences:
    return schemes.TeacherSequences(tokens(), torch.ones(2, 3, dtype=torch.bool))


def early() -> schemes.EarlyExitNetwork:
    return schemes.EarlyExitNetwork([nn.Linear(3, 3), nn.Linear(3, 3)], [nn.Linear(3, 5), nn.Linear(3, 5)]).eval()


def train(student: nn.Module, teachers: Any) -> None:
    """As long as any training that does nothing."""


PAIR = {"student_logits": logits(), "teacher_logits": logits(4, 5) + 1}
HEADS = {"student_hidden": logits(4, 3), "student_weight": logits(5, 3), "teacher_hidden": logits(4, 2),
         "teacher_weight": logits(5, 2)}  # fmt: skip
# A call that is good of everything public; methods by the name of their class.
EXAMPLES: dict[str, Callable[[], Example]] = {
    "Adapter": lambda: (kdkernels.Adapter, {"student_channels": 2, "teacher_channels": 3}),
    "GlobalContext": lambda: (kdkernels.GlobalContext, {"channels": 3}),
    "VariationalInformationLoss": lambda: (kdkernels.VariationalInformationLoss, {"channels": 3}),
    "Queue": lambda: (kdkernels.Queue, {"size": 4, "features": 3}),
    "Queue.enqueue": lambda: (kdkernels.Queue(4, 3).enqueue, {"embeddings": logits(2, 3)}),
    "union_support": lambda: (
        kdkernels.union_support,
        {"student_logits": logits(), "teacher_indices": torch.tensor([[0, 1]] * 4), "k": 2},
    ),
    "use_backend": lambda: (entered(kdkernels.use_backend), {"name": "cpu"}),
    "FeatureCapture": lambda: (kdkernels.FeatureCapture, {"model": net(), "names": ["0", "2"]}),
    "MultiLayerLoss": lambda: (
        kdkernels.MultiLayerLoss,
        {"pairs": [("0", "0")], "losses": kdkernels.hint_loss, "weights": [1.0], "adapters": [nn.Identity()]},
    ),
    "MultiLayerLoss.forward": lambda: (
        kdkernels.MultiLayerLoss([("0", "0")], kdkernels.hint_loss).forward,
        {"student": {"0": logits()}, "teacher": {"0": logits()}},
    ),
    "match_layers": lambda: (
        kdkernels.match_layers,
        {"student": net(), "teacher": net(), "how": "sensitivity", "batch": logits(2, 3), "loss": torch.sum},
    ),
    "layers_of": lambda: (features.layers_of, {"model": net()}),
    "count_items": lambda: (distributed.count_items, {"tokens": labels()}),
    "vocab_parallel_loss": lambda: (distributed.vocab_parallel_loss, {**PAIR, "labels": labels(), "alpha": 0.5}),
    "vocab_parallel_linear_loss": lambda: (
        distributed.vocab_parallel_linear_loss, {**HEADS, "labels": labels(), "alpha": 0.5},
    ),
    "Constant": lambda: (schemes.Constant, {"value": 1.0}),
    "Linear": lambda: (schemes.Linear, {"start": 1.0, "end": 2.0, "steps": 3.0}),
    "Cosine": lambda: (schemes.Cosine, {"start": 1.0, "end": 2.0, "steps": 3.0}),
    "EMATeacher": lambda: (schemes.EMATeacher, {"student": net()}),
    "EMATeacher.update": lambda: (schemes.EMATeacher(net()).update, {"student": net()}),
    "EarlyExitNetwork": lambda: (
        schemes.EarlyExitNetwork, {"stages": [nn.Linear(3, 3)], "heads": [nn.Linear(3, 5)]},
    ),
    "EarlyExitNetwork.infer": lambda: (early().infer, {"x": logits(2, 3), "threshold": 0.5}),
    "LearnableTemperature": lambda: (schemes.LearnableTemperature, {}),
    "LearnableTemperature.forward": lambda: (schemes.LearnableTemperature().forward, {}),
    "LearningWithoutForgetting": lambda: (schemes.LearningWithoutForgetting, {}),
    "SnapshotTeacher": lambda: (schemes.SnapshotTeacher, {"model": net()}),
    "TeacherSequences": lambda: (
        schemes.TeacherSequences, {"tokens": tokens(), "completion_mask": torch.ones(2, 3, dtype=torch.bool)},
    ),
    "TeacherSequences.write": lambda: (
        schemes.TeacherSequences.write, {"generate": lambda x: torch.cat([x, x], 1), "prompts": tokens()},
    ),
    "TeacherSequences.draw": lambda: (written().draw, {"count": 2}),
    "TeacherSequences.batches": lambda: (listed(written().batches), {"size": 2}),
    "TemporalEnsemble": lambda: (schemes.TemporalEnsemble, {"samples": 4, "classes": 5}),
    "TemporalEnsemble.update": lambda: (
        schemes.TemporalEnsemble(4, 5).update, {"indices": torch.tensor([0, 2]), "predictions": logits(2, 5)},
    ),
    "TemporalEnsemble.forward": lambda: (schemes.TemporalEnsemble(4, 5).forward, {"indices": torch.tensor([0, 2])}),
    "anchor_distillation_loss": lambda: (
        schemes.anchor_distillation_loss, {"student_logits": logits(), "anchor_logits": logits() + 1},
    ),
    "average_logits": lambda: (functools.partial(schemes.average_logits, [net()]), {}),
    "born_again": lambda: (schemes.born_again, {"make": net, "generations": 2, "train": train}),
    "by_capacity": lambda: (
        schemes.by_capacity, {"student": net(), "teacher": net(), "equal": 1.0, "apart": 2.0},
    ),
    "capacity_gap": lambda: (schemes.capacity_gap, {"student": net(), "teacher": net()}),
    "collaborative_loss": lambda: (
        schemes.collaborative_loss,
        {"logits": [logits(), logits() + 1], "labels": labels(), "influence": [[0, 0.5], [1, 0]], "label_weights": [1, 1]},
    ),
    "confidence_weight": lambda: (schemes.confidence_weight, {"teacher_logits": logits(), "labels": labels()}),
    "distill_chain": lambda: (schemes.distill_chain, {"students": [net()], "train": train}),
    "ensemble_logits": lambda: (
        schemes.ensemble_logits, {"logits": [logits(), logits() + 1], "labels": labels(), "how": "best"},
    ),
    "frozen": lambda: (functools.partial(entered(schemes.frozen), net()), {}),
    "mutual_learning_loss": lambda: (
        schemes.mutual_learning_loss, {"logits": [logits(), logits() + 1], "labels": labels()},
    ),
    "scale_gradient": lambda: (schemes.scale_gradient, {"x": logits(), "factor": 0.5}),
    "self_distillation_loss": lambda: (
        schemes.self_distillation_loss, {"logits": [logits(), logits() + 1], "labels": labels()},
    ),
    "semi_supervised_loss": lambda: (schemes.semi_supervised_loss, {**PAIR, "labels": labels()}),
    "synthetic_batch": lambda: (
        schemes.synthetic_batch,
        {"teacher": net(), "start": logits(4, 3), "labels": labels(), "steps": 1, "bounds": (-1.0, 1.0)},
    ),
}  # fmt: skip


def entered(make: Callable[..., Any]) -> Callable[..., None]:
    @functools.wraps(make)
    def enter(*args: Any, **kwargs: Any) -> None:
        with make(*args, **kwargs):
            pass

    return enter


def listed(make: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(make)(lambda *args, **kwargs: list(make(*args, **kwargs)))


# What a user's model or function makes of a value of the right kind, and torch of moving one, they say in their own words.
THEIRS = {
    "match_layers": ("batch", "loss"), "EarlyExitNetwork.infer": ("x",), "TeacherSequences.write": ("generate", "prompts"),
    "born_again": ("make",), "synthetic_batch": ("start", "labels"), "Queue.enqueue": ("embeddings",),
    "TemporalEnsemble.update": ("predictions",),
}  # fmt: skip
ENDLESS = ("generations", "steps", "samples", "size", "start")  # as many as one asks for


def is_loss(x: Any) -> bool:
    """Which test_fuzz.py tries, and the modules that only keep its options."""
    losses = {m.__dict__["function"].__func__ for m in LossModule.__subclasses__()}
    return x in losses or (inspect.isclass(x) and issubclass(x, LossModule) and "__init__" not in x.__dict__)


@pytest.fixture
def alone() -> Iterator[None]:
    """One process that is all ranks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_every_public_piece_is_here() -> None:
    names = {
        n
        for module in (kdkernels, schemes, features, distributed)
        for n in module.__all__
        if not is_loss(getattr(module, n))
    }
    assert names - {"BackendError"} == {name for name in EXAMPLES if "." not in name}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("ignore:.*")
def test_a_piece_takes_or_names_what_is_wrong(name: str) -> None:
    function, good = EXAMPLES[name]()
    found = []
    for argument, what, make in replacements(function, good):
        if what == "a huge integer" and argument in ENDLESS:
            continue
        if argument in THEIRS.get(name, ()) and takes(hints_of(function)[argument], make()):
            continue
        function, good = EXAMPLES[name]()  # afresh: what was tried before may have changed it
        if problem := trouble(function, good, argument, make, also=("student", "teacher", "labels", "backend")):
            found.append(f"{argument} = {what}: {problem}")
    assert not found, "\n".join([f"{len(found)} of {name}:", *found])
