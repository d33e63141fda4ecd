"""The vision libraries' stand-ins against those libraries' formulas, in float64: values and gradients."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from published import F64, close
from standins import (
    attention,
    correlation,
    dkd,
    flow,
    kd,
    likelihood,
    maps,
    randn,
    relations,
    review,
    same,
    selectivity,
    similarity,
    transfer,
)
from torch import nn

from kdkernels.integrations import mdistiller as md
from kdkernels.integrations import repdistiller as rd

N, V = 6, 7


# ------------------------------------------------------------------------------------------------------------ RepDistiller


def test_repdistiller_logits_and_embeddings():
    logits = randn(N, V), randn(N, V, seed=1)
    same(rd.DistillKL(4), lambda s, t: kd(s, t, 4), *logits, teachers=True)
    same(rd.DistillKL(4), lambda s, t: kd(s, t, 4), randn(N, V, 3), randn(N, V, 3, seed=1))
    same(rd.HintLoss(), F.mse_loss, *logits, teachers=True)
    same(rd.Correlation(), correlation, *logits, teachers=True)
    wide = randn(N, 5), randn(N, 9, seed=1)
    same(rd.PKT(), transfer, *wide, teachers=True)
    same(rd.RKDLoss(), relations, *wide)
    same(rd.RKDLoss(w_d=1, w_a=2), lambda s, t: relations(s, t, False, 1, 2), *wide)
    teacher = wide[1].clone().requires_grad_()
    assert not rd.RKDLoss()(wide[0], teacher).requires_grad


@pytest.mark.parametrize("larger", ["student", "teacher", "neither"])
def test_repdistiller_layers(larger):
    s, t = maps(), maps(((3, 4), (6, 5)), seed=9)
    if larger == "teacher":
        s, t = t, s
    elif larger == "neither":
        s = maps(((5, 4), (2, 5)))
    for p in (2, 3):
        same(lambda *x, p=p: torch.stack(rd.Attention(p)(x[:2], x[2:])),
             lambda *x, p=p: torch.stack([attention(x[0], x[2], p), attention(x[1], x[3], p)]), *s, *t, teachers=True)  # fmt: skip
    for ours, published in ((rd.Similarity(), similarity), (rd.NSTLoss(), selectivity)):
        same(lambda *x, ours=ours: torch.stack(ours(x[:2], x[2:])),
             lambda *x, published=published: torch.stack([published(x[0], x[2]), published(x[1], x[3])]),
             *s, *t, teachers=True)  # fmt: skip


def test_repdistiller_flow():
    s, t = maps(((4, 8), (6, 5), (3, 5))), maps(((4, 6), (6, 6), (3, 3)), seed=9)
    shapes = [x.shape for x in s], [x.shape for x in t]
    fsp = rd.FSP(*shapes)
    same(lambda *x: torch.stack(fsp(x[:3], x[3:])),
         lambda *x: torch.stack([flow(x[0], x[1], x[3], x[4]), flow(x[1], x[2], x[4], x[5])]), *s, *t, teachers=True)  # fmt: skip
    with pytest.raises(ValueError, match="same channels"):
        rd.FSP(shapes[0], [(3, 5, 6, 6), *shapes[1][1:]])


@pytest.mark.parametrize("sizes", [(8, 5), (5, 8)])
def test_variational_information(sizes):
    torch.manual_seed(0)
    loss = rd.VIDLoss(4, 5, 6, init_pred_var=2.0, eps=0.1).double()
    assert set(loss.state_dict()) == {"log_scale", "regressor.0.weight", "regressor.2.weight", "regressor.4.weight"}
    assert torch.allclose(F.softplus(loss.log_scale) + loss.eps, torch.tensor(2.0, dtype=F64))
    s, t = randn(3, 4, sizes[0], sizes[0]), randn(3, 6, sizes[1], sizes[1], seed=1)
    parameters = list(loss.parameters())
    for ours in (loss, lambda s, t: md.vid_loss(loss.regressor, loss.log_scale, s, t, 0.1)):
        got, expected = ours(s, t), likelihood(loss.regressor, loss.log_scale, s, t, 0.1)
        grads = (list(torch.autograd.grad(x, parameters)) for x in (got, expected))
        close(*grads, 1e-9)
        close([got.detach()], [expected.detach()], 1e-9)


class Crd(nn.Module):
    """Two steps of CRD as published, with banks and embeddings given."""

    def __init__(self, like, n, momentum, temperature):
        super().__init__()
        self.heads = [(e.linear.weight, e.linear.bias) for e in (like.embed_s, like.embed_t)]
        self.banks = [like.contrast.memory_v1.clone(), like.contrast.memory_v2.clone()]
        self.z, self.n, self.m, self.T = None, n, momentum, temperature

    def forward(self, f_s, f_t, y, idx):
        v = [F.linear(x, *head) for x, head in zip((f_s, f_t), self.heads, strict=True)]
        v = [x / x.pow(2).sum(1, keepdim=True).sqrt() for x in v]
        scores = [
            (torch.einsum("nd,nkd->nk", x, bank[idx]) / self.T).exp()
            for x, bank in zip(v, self.banks[::-1], strict=True)
        ]
        if self.z is None:
            self.z = [float(x.detach().mean()) * self.n for x in scores]
        loss, c = 0.0, (idx.shape[1] - 1) / self.n
        for x, z in zip(scores, self.z, strict=True):
            x = x / z
            terms = (x[:, 0] / (x[:, 0] + c + 1e-7)).log().sum() + (c / (x[:, 1:] + c + 1e-7)).log().sum()
            loss = loss - terms / len(y)
        for k, x in enumerate(v):
            moved = self.m * self.banks[k][y] + (1 - self.m) * x.detach()
            self.banks[k] = self.banks[k].index_copy(0, y, F.normalize(moved))
        return loss.view(1)


@pytest.mark.parametrize("samples", [40, 200])  # products with the whole bank, and gathered
def test_contrastive_representations(samples):
    torch.manual_seed(0)
    opt = types.SimpleNamespace(s_dim=5, t_dim=6, feat_dim=4, n_data=samples, nce_k=9, nce_t=0.07, nce_m=0.3)
    loss = rd.CRDLoss(opt).double()
    assert {"contrast.params", "contrast.memory_v1", "contrast.memory_v2", "embed_s.linear.weight"} <= set(
        loss.state_dict()
    )
    published = Crd(loss, samples, 0.3, 0.07)
    losses = []
    for step in range(2):  # both before a backward: the banks of the first must outlive the second
        s, t, y = randn(N, 5, seed=step), randn(N, 6, seed=9 + step), torch.randperm(samples)[:N]
        idx = torch.randint(samples, (N, 10))
        idx[:, 0] = y
        losses.append((loss(s, t, y, idx), published(s, t, y, idx)))
    # float32 holds the normalisers.
    ours, theirs = (sum(each) for each in zip(*losses, strict=True))
    assert ours.shape == (1,)
    close([ours.detach()], [theirs.detach()], 1e-6)
    close(*(list(torch.autograd.grad(x.sum(), list(loss.parameters()))) for x in (ours, theirs)), 1e-6)
    close([loss.contrast.memory_v1, loss.contrast.memory_v2], published.banks, 1e-9)
    assert loss(s, t, y).isfinite().all()  # negatives drawn
    resumed = rd.CRDLoss(opt).double()
    resumed.load_state_dict(loss.state_dict())
    resumed(randn(N, 5, seed=7), randn(N, 6, seed=8), y)
    assert torch.equal(resumed.contrast.params, loss.contrast.params)  # normalisers are the first batch's for good


# -------------------------------------------------------------------------------------------------------------- mdistiller


def test_mdistiller_logits_and_embeddings():
    logits, target = (randn(N, V), randn(N, V, seed=1)), torch.arange(N) % V
    same(lambda s, t: md.kd_loss(s, t, 3.0), lambda s, t: kd(s, t, 3.0), *logits, teachers=True)
    same(lambda s, t: md.dkd_loss(s, t, target, 1.5, 8.0, 4.0), lambda s, t: dkd(s, t, target, 1.5, 8.0, 4.0), *logits)
    wide = randn(N, 5), randn(N, 9, seed=1)
    same(md.pkt_loss, transfer, *wide, teachers=True)
    same(lambda s, t: md.pkt_loss(s, t, 1e-3), lambda s, t: transfer(s, t, 1e-3), *wide, teachers=True)
    for squared in (False, True):
        same(
            lambda s, t, q=squared: md.rkd_loss(s, t, q, 1e-12, 2, 3),
            lambda s, t, q=squared: relations(s, t, q, 2, 3), *wide,
        )  # fmt: skip
        same(
            lambda s, t, q=squared: md.rkd_loss(s, t, q, 9.0, 2, 3),
            lambda s, t, q=squared: relations(s, t, q, 2, 3, 9.0), *wide,
        )  # fmt: skip


def test_mdistiller_layers():
    s, t = maps(), maps(((3, 4), (6, 5)), seed=9)
    for ours, published in (
        (md.sp_loss, similarity),
        (md.nst_loss, selectivity),
        (lambda s, t: md.at_loss(s, t, 2), lambda s, t: attention(s, t, 2)),
    ):
        same(lambda *x, ours=ours: ours(x[:2], x[2:]),
             lambda *x, published=published: published(x[0], x[2]) + published(x[1], x[3]), *s, *t, teachers=True)  # fmt: skip
    same(lambda s, t: md.single_stage_at_loss(s, t, 3), lambda s, t: attention(s, t, 3), s[0], t[0])
    same(md.single_stage_nst_loss, selectivity, s[0], t[0])
    same(md.similarity_loss, similarity, s[0], t[0])
    t = maps(seed=9)
    same(lambda *x: md.hcl_loss(x[:2], x[2:]), lambda *x: review(x[0], x[2]) + review(x[1], x[3]), *s, *t)


def test_a_distiller_takes_ours_as_the_page_says(tmp_path, monkeypatch):
    """A distiller's class hides the module of its name, as mdistiller/distillers/__init__.py has it."""
    package = tmp_path / "mdistiller" / "distillers"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from .DKD import DKD\n")
    (package / "DKD.py").write_text("dkd_loss = None\n\nclass DKD:\n    loss = staticmethod(lambda: dkd_loss)\n")
    page = Path(__file__).resolve().parents[1] / "docs/migrate/mdistiller.md"
    code = page.read_text().split("```\n")[1]
    monkeypatch.syspath_prepend(tmp_path)
    with mock.patch.dict(sys.modules):
        for name in [n for n in sys.modules if n.partition(".")[0] == "mdistiller"]:
            del sys.modules[name]
        exec(code, {})
        assert importlib.import_module("mdistiller.distillers").DKD.loss() is md.dkd_loss


def test_a_certain_teacher_of_two_classes_is_finite():
    s, t = torch.tensor([[0.3, -0.2]], requires_grad=True), torch.tensor([[200.0, -200.0]])
    loss = md.dkd_loss(s, t, torch.tensor([0]), 1.0, 8.0, 1.0)
    assert loss.isfinite() and torch.autograd.grad(loss, s)[0].isfinite().all()
