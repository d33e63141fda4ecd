"""The language-model libraries' stand-ins against those libraries' formulas, in float64: values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from published import close, gradients
from standins import randn, same

from kdkernels.integrations import liger, torchtune
from kdkernels.integrations.modelopt import LogitsDistillationLoss
from kdkernels.integrations.trl import generalized_jsd_loss, use_in

B, T, V, H = 2, 3, 7, 4
LABELS = torch.tensor([[1, -100, 3], [-100, 0, 6]])
OTHER_LABELS = LABELS.masked_fill(LABELS == -100, 255)
BETAS = (0.0, 0.1, 0.5, 1.0)


def jsd(log_q, log_p, beta):
    """Of every row."""
    if beta in (0.0, 1.0):
        a, b = (log_p, log_q) if beta == 0 else (log_q, log_p)
        return (a.exp() * (a - b)).sum(-1)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return (beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)).sum(-1)


def soft(s, t, beta, temperature):
    return jsd((s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1), beta)


@pytest.mark.parametrize("beta", BETAS)
def test_trl(beta):
    logits, kept = (randn(B, T, V), randn(B, T, V, seed=1)), LABELS != -100
    for reduction, of_kept, of_all in (("batchmean", 4, B), ("sum", 1, 1), ("mean", 4 * V, B * T * V)):
        same(lambda s, t, r=reduction: generalized_jsd_loss(s, t, LABELS, beta, 2.0, r),
             lambda s, t, d=of_kept: soft(s, t, beta, 2.0)[kept].sum() / d, *logits, teachers=True)  # fmt: skip
        same(lambda s, t, r=reduction: generalized_jsd_loss(s, t, beta=beta, reduction=r),
             lambda s, t, d=of_all: soft(s, t, beta, 1.0).sum() / d, *logits)  # fmt: skip
    for items, reduction in ((10, "batchmean"), (torch.tensor(10), "batchmean"), (10, "mean"), (10, "sum")):
        same(lambda s, t, n=items, r=reduction: generalized_jsd_loss(s, t, LABELS, beta, 1.0, r, n),
             lambda s, t: soft(s, t, beta, 1.0)[kept].sum() / 10, *logits)  # fmt: skip
    with pytest.raises(ValueError, match="reduction"):
        generalized_jsd_loss(*logits, reduction="none")


def test_trl_trainer():
    class Trainer:
        generalized_jsd_loss = staticmethod(lambda **_: None)

    one, other = use_in(Trainer()), Trainer()
    s, t = randn(B, T, V), randn(B, T, V, seed=1)
    # As TRL 1.16's compute_loss calls it.
    loss = one.generalized_jsd_loss(
        student_logits=s, teacher_logits=t, labels=LABELS, beta=0.3, num_items_in_batch=torch.tensor(4)
    )
    assert torch.equal(loss, generalized_jsd_loss(s, t, LABELS, 0.3, num_items_in_batch=4))
    assert other.generalized_jsd_loss() is None
    with pytest.raises(TypeError, match="method generalized_jsd_loss, as GKDTrainer; got int"):
        use_in(1)


@pytest.mark.parametrize("normalize", [True, False])
def test_torchtune(normalize):
    s, t, kept = randn(B * T, V), randn(B * T, V, seed=1), LABELS.flatten() != -100

    def forward(s, t):
        rows = -(t.softmax(-1) * s.log_softmax(-1)).sum(-1)
        return rows[kept].mean() if normalize else rows[kept].sum()

    def reverse(s, t):
        rows = (s.softmax(-1) * (s.log_softmax(-1) - t.log_softmax(-1))).sum(-1)
        return rows[kept].mean() if normalize else rows[kept].sum()

    def symmetric(s, t):
        return 0.3 * forward(s, t) + 0.7 * reverse(s, t)

    for name, arguments, published in (
        ("Forward", (), forward),
        ("Reverse", (), reverse),
        ("Symmetric", (0.3,), symmetric),
    ):
        loss = getattr(torchtune, f"{name}KLLoss")(*arguments)
        same(lambda s, t, loss=loss: loss(s, t, LABELS, normalize), published, s, t, teachers=True)
        of_255 = getattr(torchtune, f"{name}KLLoss")(*arguments, ignore_index=255)
        same(lambda s, t, loss=of_255: loss(s, t, OTHER_LABELS, normalize), published, s, t)
        nothing = loss(s.requires_grad_(), t, torch.full((B, T), -100), normalize)
        assert nothing == 0
        s = s.detach()
        if normalize:
            chunked = getattr(torchtune, f"{name}KLWithChunkedOutputLoss")(2, *arguments)
            same(lambda s, t, loss=chunked: loss(s.view(B, T, V).chunk(2, 1), t.view(B, T, V).chunk(2, 1), LABELS),
                 published, s, t, teachers=True)  # fmt: skip
            chunked_255 = getattr(torchtune, f"{name}KLWithChunkedOutputLoss")(2, *arguments, ignore_index=255)
            halves = [x.view(B, T, V).chunk(2, 1) for x in (s, t)]
            assert torch.equal(chunked_255(*halves, OTHER_LABELS), chunked(*halves, LABELS))
            assert chunked(s[None].chunk(2, 1), t[None].chunk(2, 1), torch.full((1, B * T), -100)) == 0
    with pytest.raises(ValueError, match="sym_kd_ratio must be between 0 and 1, got 1.5"):
        torchtune.SymmetricKLLoss(1.5)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
def test_modelopt(reduction):
    def published(s, t):
        terms = F.kl_div((s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="none")
        rows, elements = terms.sum(-1), terms.numel()
        return (
            4 * {"mean": rows.sum() / elements, "batchmean": rows.sum() / B, "sum": rows.sum(), "none": rows}[reduction]
        )

    loss = LogitsDistillationLoss(2.0, reduction)
    same(loss, published, randn(B, T, V), randn(B, T, V, seed=1))
    assert not loss(randn(B, V), randn(B, V, seed=1).requires_grad_()).requires_grad
    with pytest.raises(ValueError, match="reduction"):
        LogitsDistillationLoss(reduction="rowmean")


@pytest.mark.parametrize("beta", BETAS)
def test_liger_jsd(beta):
    logs, labels = tuple(randn(B * T, V, seed=k).log_softmax(1) for k in range(2)), LABELS.flatten()
    same(liger.LigerJSD(beta), lambda q, p: jsd(q, p, beta).mean(), *logs)
    for ignored in (-100, 255):
        same(lambda q, p, i=ignored: liger.LigerJSD(beta, i)(q, p, labels.masked_fill(labels == -100, i)),
             lambda q, p: jsd(q, p, beta)[labels != -100].mean(), *logs)  # fmt: skip


def test_liger_kl():
    log_q, p = randn(B, V).log_softmax(1), randn(B, V, seed=1).softmax(1)
    same(liger.LigerKLDIVLoss(reduction="batchmean"), lambda q, p: (p * (p.log() - q)).sum() / B, log_q, p)
    same(liger.LigerKLDIVLoss(reduction="sum", log_target=True), lambda q, p: (p.exp() * (p - q)).sum(), log_q, p.log())
    assert not liger.LigerKLDIVLoss(reduction="sum")(log_q, p.requires_grad_()).requires_grad


@pytest.mark.parametrize("beta", BETAS)
def test_liger_linear(beta):
    kept, labels = LABELS.flatten() != -100, OTHER_LABELS.flatten()
    hidden, head, bias = randn(B * T, H), randn(V, H, seed=1), randn(V, seed=2)
    t_hidden, t_head, t_bias = randn(B * T, H + 1, seed=3), randn(V, H + 1, seed=4), randn(V, seed=5)
    plain, teacher = liger.LigerFusedLinearJSD(beta, 255, temperature=2.0), t_hidden @ t_head.T
    close(gradients(lambda x, w: plain(x, w, t_hidden, t_head, labels), hidden, head),
          gradients(lambda x, w: soft(x @ w.T, teacher, beta, 2.0)[kept].mean(), hidden, head), 1e-9)  # fmt: skip
    both = liger.LigerFusedLinearJSDLoss(0.4, 1.2, beta, 255, temperature=2.0, compiled=False)

    def expected(x, w, b):
        z = x @ w.T + b
        return (
            0.4 * F.cross_entropy(z, labels, ignore_index=255) + 1.2 * soft(z, teacher + t_bias, beta, 2.0)[kept].mean()
        )

    close(gradients(lambda x, w, b: both(x, w, t_hidden, t_head, labels, b, t_bias), hidden, head, bias),
          gradients(expected, hidden, head, bias), 1e-9)  # fmt: skip
    with pytest.raises(ValueError, match="weight_hard_loss"):
        liger.LigerFusedLinearJSDLoss(-1.0, 1.0)
