"""Wrong arguments to the stand-ins for other libraries: whatever comes, a value or an error, and no NaN from good numbers.

Their arguments have the peers' names and their constructors the peers' manners, so that errors need not name what was passed,
as those of the losses must (test_fuzz.py).
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from wrong import moderate, replacements

from kdkernels.integrations import liger, mdistiller, modelopt, repdistiller, torchdistill, torchtune, trl
from kdkernels.integrations import torch as of_torch

NAMES = {
    "student_module_path": "m",
    "student_module_io": "output",
    "teacher_module_path": "m",
    "teacher_module_io": "output",
}
ENDINGS = {"student_output_path": "m", "teacher_output_path": "m", "reduction": "batchmean"}
LABELS = torch.tensor([0, 1, 2, 4])
PAIRS = {"a": {"student": {"path": "m", "io": "output"}, "teacher": {"path": "m", "io": "output"}, "weight": 1}}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def maps(seed: int) -> list[torch.Tensor]:
    return [rand(3, 4, 6, 6, seed=seed), rand(3, 5, 3, 3, seed=seed + 1)]


def io(x: torch.Tensor) -> dict[str, Any]:
    return {"m": {"output": x, "input": x}}


SCORES = rand(4, 5), rand(4, 5, seed=1)
MAP = rand(3, 4, 6, 6), rand(3, 4, 6, 6, seed=1)
HIDDEN = rand(4, 3), rand(5, 3), rand(4, 2), rand(5, 2)
OF_SCORES, OF_MAPS = (io(SCORES[0]), io(SCORES[1])), (io(MAP[0]), io(MAP[1]))
# The object that is called, and good positional arguments.
EXAMPLES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "torch.kl_div": (of_torch.kl_div, (SCORES[0].log_softmax(1), SCORES[1].softmax(1))),
    "torch.KLDivLoss": (of_torch.KLDivLoss(), (SCORES[0].log_softmax(1), SCORES[1].softmax(1))),
    "liger.LigerKLDIVLoss": (liger.LigerKLDIVLoss(), (SCORES[0].log_softmax(1), SCORES[1].softmax(1))),
    "liger.LigerJSD": (liger.LigerJSD(), (SCORES[0].log_softmax(1), SCORES[1].log_softmax(1), LABELS)),
    "liger.LigerFusedLinearJSD": (liger.LigerFusedLinearJSD(), (*HIDDEN, LABELS)),
    "liger.LigerFusedLinearJSDLoss": (liger.LigerFusedLinearJSDLoss(), (*HIDDEN, LABELS)),
    "mdistiller.kd_loss": (mdistiller.kd_loss, (*SCORES, 4.0)),
    "mdistiller.dkd_loss": (mdistiller.dkd_loss, (*SCORES, LABELS, 1.0, 8.0, 4.0)),
    "mdistiller.rkd_loss": (mdistiller.rkd_loss, SCORES),
    "mdistiller.sp_loss": (mdistiller.sp_loss, (maps(0), maps(2))),
    "mdistiller.similarity_loss": (mdistiller.similarity_loss, MAP),
    "mdistiller.at_loss": (mdistiller.at_loss, (maps(0), maps(2), 2)),
    "mdistiller.single_stage_at_loss": (mdistiller.single_stage_at_loss, (*MAP, 2)),
    "mdistiller.nst_loss": (mdistiller.nst_loss, (maps(0), maps(2))),
    "mdistiller.single_stage_nst_loss": (mdistiller.single_stage_nst_loss, MAP),
    "mdistiller.pkt_loss": (mdistiller.pkt_loss, SCORES),
    "mdistiller.hcl_loss": (mdistiller.hcl_loss, (maps(0), maps(2))),
    "mdistiller.vid_loss": (mdistiller.vid_loss, (torch.nn.Conv2d(4, 4, 1), torch.ones(4), *MAP)),
    "modelopt.LogitsDistillationLoss": (modelopt.LogitsDistillationLoss(), SCORES),
    "repdistiller.DistillKL": (repdistiller.DistillKL(4.0), SCORES),
    "repdistiller.HintLoss": (repdistiller.HintLoss(), MAP),
    "repdistiller.Attention": (repdistiller.Attention(), (maps(0), maps(2))),
    "repdistiller.Similarity": (repdistiller.Similarity(), (maps(0), maps(2))),
    "repdistiller.Correlation": (repdistiller.Correlation(), SCORES),
    "repdistiller.RKDLoss": (repdistiller.RKDLoss(), SCORES),
    "repdistiller.PKT": (repdistiller.PKT(), SCORES),
    "repdistiller.NSTLoss": (repdistiller.NSTLoss(), (maps(0), maps(2))),
    "repdistiller.FSP": (repdistiller.FSP([(3, 4, 6, 6)] * 2, [(3, 4, 6, 6)] * 2), ([*MAP], [*MAP])),
    "repdistiller.VIDLoss": (repdistiller.VIDLoss(4, 3, 4), MAP),
    "repdistiller.CRDLoss": (
        repdistiller.CRDLoss(types.SimpleNamespace(s_dim=5, t_dim=5, feat_dim=3, n_data=20, nce_k=4, nce_t=0.07, nce_m=0.5)),
        (*SCORES, LABELS, torch.tensor([[0, 5, 6, 7, 8], [1, 5, 6, 7, 8], [2, 5, 6, 7, 8], [4, 5, 6, 7, 8]])),
    ),
    "torchdistill.KDLoss": (torchdistill.KDLoss(**NAMES, temperature=4.0, alpha=0.5), (*OF_SCORES, LABELS)),
    "torchdistill.LogitStdKDLoss": (torchdistill.LogitStdKDLoss(**NAMES, temperature=4.0, alpha=0.5), (*OF_SCORES, LABELS)),
    "torchdistill.ATLoss": (torchdistill.ATLoss({"a": PAIRS["a"]}), OF_MAPS),
    "torchdistill.PKTLoss": (torchdistill.PKTLoss(**NAMES), OF_SCORES),
    "torchdistill.RKDLoss": (torchdistill.RKDLoss(**{**ENDINGS, "reduction": "mean"}, dist_factor=1.0, angle_factor=2.0), OF_SCORES),
    "torchdistill.SPKDLoss": (torchdistill.SPKDLoss(**ENDINGS), OF_MAPS),
    "torchdistill.HierarchicalContextLoss": (torchdistill.HierarchicalContextLoss(**NAMES), (io([*MAP]), OF_MAPS[1])),
    "torchdistill.DISTLoss": (torchdistill.DISTLoss(**NAMES), OF_SCORES),
    "torchtune.ForwardKLLoss": (torchtune.ForwardKLLoss(), (*SCORES, LABELS)),
    "torchtune.ReverseKLLoss": (torchtune.ReverseKLLoss(), (*SCORES, LABELS)),
    "torchtune.SymmetricKLLoss": (torchtune.SymmetricKLLoss(), (*SCORES, LABELS)),
    "torchtune.ForwardKLWithChunkedOutputLoss": (
        torchtune.ForwardKLWithChunkedOutputLoss(2), ([*SCORES[0][None].chunk(2, 1)], [*SCORES[1][None].chunk(2, 1)], LABELS[None])
    ),
    "torchtune.ReverseKLWithChunkedOutputLoss": (
        torchtune.ReverseKLWithChunkedOutputLoss(2), ([*SCORES[0][None].chunk(2, 1)], [*SCORES[1][None].chunk(2, 1)], LABELS[None])
    ),
    "torchtune.SymmetricKLWithChunkedOutputLoss": (
        torchtune.SymmetricKLWithChunkedOutputLoss(2), ([*SCORES[0][None].chunk(2, 1)], [*SCORES[1][None].chunk(2, 1)], LABELS[None])
    ),
    "trl.generalized_jsd_loss": (trl.generalized_jsd_loss, (*SCORES, LABELS)),
}  # fmt: skip
# What these have in common with their bases is tried there: their constructors take what those take.
LEFT_OUT = {
    "torchdistill.FSPLoss": "needs pairs of four layers", "torchdistill.ChSimLoss": "as SPKDLoss",
    "torchdistill.VIDLoss": "as repdistiller.VIDLoss", "torchdistill.CCKDLoss": "as repdistiller.Correlation",
    "torchdistill.CRDLoss": "as repdistiller.CRDLoss", "torchdistill.register": "takes names alone",
    "trl.use_in": "takes a trainer",
}  # fmt: skip
ERRORS = (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError, ZeroDivisionError)


def test_every_stand_in_is_here() -> None:
    modules = {"torch": of_torch, "liger": liger, "mdistiller": mdistiller, "modelopt": modelopt, "repdistiller": repdistiller,
               "torchdistill": torchdistill, "torchtune": torchtune, "trl": trl}  # fmt: skip
    public = {f"{name}.{one}" for name, module in modules.items() for one in module.__all__}
    assert public == {*EXAMPLES, *LEFT_OUT}


def every_number(found: Any) -> list[torch.Tensor]:
    return [x for x in (found if isinstance(found, list) else [found]) if isinstance(x, torch.Tensor) and x.is_cpu]


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("ignore")  # torch's own about reductions and sizes, as the peers have them
def test_a_stand_in_takes_or_refuses(name: str) -> None:
    called, good = EXAMPLES[name]
    function = called.forward if isinstance(called, torch.nn.Module) else called
    arguments = dict(zip(inspect.signature(function).parameters, good))
    assert all(x.isfinite().all() for x in every_number(called(*good)))
    found = []
    state = copy.deepcopy(called.state_dict()) if isinstance(called, torch.nn.Module) else None
    for argument, what, make in replacements(function, arguments):
        value = make()
        if state is not None:
            called.load_state_dict(state)  # a memory bank keeps what it was given, NaN too
        try:
            result = called(**{**arguments, argument: value})
        except ERRORS:
            continue
        if moderate(value) and any(x.isnan().any() for x in every_number(result)):
            found.append(f"{argument} = {what}: NaN")
    assert not found, "\n".join(found)
