"""torchdistill's stand-ins against its formulas, and against torchdistill where it is installed."""

from __future__ import annotations

import importlib
import sys

import pytest
import standins
import torch
import torch.nn.functional as F
from published import F64, close, gradients
from standins import randn, same

from kdkernels.integrations import torchdistill as td

N, V = 6, 7
MODULES = ("s", "output", "t", "input")
PAIR = {"student": {"path": "s", "io": "output"}, "teacher": {"path": "t", "io": "input"}}
FSP = {
    f"{model}_{place}": {"path": f"{model[0]}{k}", "io": "output"}
    for model in ("student", "teacher") for k, place in enumerate(("first", "second"))
}  # fmt: skip
TARGETS = torch.arange(N) % V


def within(loss, targets=None):
    """A loss of torchdistill's form as a function of the student's tensor and the teacher's."""

    def function(s, t):
        return loss({"s": {"output": s}}, {"t": {"input": t, "output": t}}, targets)

    return function


def hard(s, targets=TARGETS, **options):
    return F.cross_entropy(s, targets, **options)


def standardized(x, eps):
    return (x - x.mean(1, keepdim=True)) / (eps + x.std(1, keepdim=True))


def lengths(s1, s2, t1, t2):
    def products(x, y):
        size = min(x.shape[2], y.shape[2])
        x, y = (F.adaptive_max_pool2d(m, size).flatten(2) for m in (x, y))
        return x @ y.mT / size**2

    return (products(s1, s2) - products(t1, t2)).pow(2).sum(1).sqrt().sum() / s1.shape[0]


def paper_attention(s, t):
    a, b = (F.normalize(x.pow(2).sum(1).flatten(1)) for x in (s, t))
    return (a - b).norm(dim=1).mean()


def channels(s, t):
    a, b = (F.normalize(x.flatten(2) @ x.flatten(2).mT, dim=2) for x in (s, t))
    return (a - b).pow(2).sum() / (s.shape[1] * s.shape[0] ** 2)


def rows(s, t, divisor):
    a, b = (g / g.abs().sum(1, keepdim=True) for g in (x.flatten(1) @ x.flatten(1).T for x in (s, t)))
    return (a - b).pow(2).sum() / divisor


def congruence(s, t, gamma, order):
    def kernel(x):
        powers = [(2 * gamma * x @ x.T) ** p / float(torch.tensor(p + 1.0).lgamma().exp()) for p in range(order + 1)]
        return torch.tensor(-2 * gamma, dtype=F64).exp() * sum(powers)

    return (kernel(s) - kernel(t)).pow(2).sum().sqrt()


def pearson(s, t, tau, beta, gamma):
    p, q = ((x / tau).softmax(1) for x in (s, t))

    def apart(a, b):
        return 1 - F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)).mean()

    return tau**2 * (beta * apart(p, q) + gamma * apart(p.T, q.T))


# ------------------------------------------------------------------------------------------------- against the formulas


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_logits(reduction):
    logits = randn(N, V), randn(N, V, seed=1)
    share = {"batchmean": 1, "mean": 1 / V, "sum": N}[reduction]
    of_hard = {"reduction": "sum" if reduction == "sum" else "mean"}

    def soft(s, t):
        return share * standins.kd(s, t, 3.0)

    options = {"temperature": 3.0, "reduction": reduction}
    same(within(td.KDLoss(*MODULES, **options), TARGETS), lambda s, t: soft(s, t) / 9, *logits)
    same(within(td.KDLoss(*MODULES, alpha=0.3, **options)), lambda s, t: soft(s, t) / 9, *logits)
    same(within(td.KDLoss(*MODULES, alpha=0.3, **options), TARGETS),
         lambda s, t: 0.3 * hard(s, **of_hard) + 0.7 * soft(s, t), *logits)  # fmt: skip
    ignoring = TARGETS.masked_fill(TARGETS == 2, 255)
    same(within(td.KDLoss(*MODULES, alpha=0.3, ignore_index=255, **options), ignoring),
         lambda s, t: 0.3 * hard(s, ignoring, ignore_index=255, **of_hard) + 0.7 * soft(s, t), *logits)  # fmt: skip
    for given, eps in (({}, 1e-7), ({"eps": 0.3}, 0.3)):
        same(within(td.LogitStdKDLoss(*MODULES, alpha=0.5, beta=9.0, **given, **options), TARGETS), lambda s, t, eps=eps:
             0.5 * hard(s, **of_hard) + 9 * soft(standardized(s, eps), standardized(t, eps)), *logits)  # fmt: skip


def test_logits_of_pixels_and_weighted_classes():
    s, t, targets = randn(2, V, 3, 3), randn(2, V, 3, 3, seed=1), torch.arange(18).view(2, 3, 3) % V
    p, q = (t / 2).softmax(1), (s / 2).softmax(1)
    expected = 0.4 * F.cross_entropy(s, targets) + 0.6 * 4 * (p * (p / q).log()).sum() / 2
    close([within(td.KDLoss(*MODULES, temperature=2.0, alpha=0.4), targets)(s, t)], [expected], 1e-9)
    s, t, weight = randn(N, V), randn(N, V, seed=1), torch.linspace(0.5, 2, V, dtype=F64)
    loss = td.KDLoss(*MODULES, temperature=2.0, alpha=0.5, beta=9.0, weight=weight, label_smoothing=0.1)
    expected = 0.5 * hard(s, weight=weight, label_smoothing=0.1) + 9 * standins.kd(s, t, 2.0)
    close([within(loss, TARGETS)(s, t)], [expected], 1e-9)


def test_embeddings():
    wide = randn(N, 5), randn(N, 9, seed=1)
    same(within(td.PKTLoss(*MODULES, eps=1e-6)), lambda s, t: standins.transfer(s, t, 1e-6), *wide)
    for d, a in ((1.0, 2.0), (1.0, 0), (0, 2.0)):
        same(within(td.RKDLoss("s", "t", d, a, "mean")), lambda s, t, d=d, a=a: standins.relations(s, t, False, d, a), *wide)  # fmt: skip
    for d, a in ((1.0, 2.0), (1.0, 0), (0, 2.0)):
        same(within(td.RKDLoss("s", "t", d, a, "sum")),
             lambda s, t, d=d, a=a: standins.relations(s, t, False, N**2 * d, N**3 * a), *wide)  # fmt: skip
    for reduction, divisor in (("batchmean", N**2), ("sum", 1)):
        same(within(td.SPKDLoss("s", "t", reduction)), lambda s, t, d=divisor: rows(s, t, d), *wide)
        for kernel, order in (({"type": "gaussian", "gamma": 0.4, "max_p": 2}, 2), ({"type": "gaussian", "gamma": 0.4, "max_p": 3}, 3), ({"type": "bilinear"}, None)):  # fmt: skip
            same(within(td.CCKDLoss("s", "t", kernel, reduction)), lambda s, t, d=divisor, order=order: (
                congruence(s, t, 0.4, order) if order else (s @ s.T - t @ t.T).pow(2).sum().sqrt()) / d, *wide)  # fmt: skip
    logits = randn(N, V), randn(N, V, seed=1)
    same(
        within(td.DISTLoss(*MODULES, beta=2.0, gamma=0.5, tau=4.0)), lambda s, t: pearson(s, t, 4.0, 2.0, 0.5), *logits
    )


def test_maps():
    maps = randn(3, 4, 5, 5), randn(3, 4, 5, 5, seed=1)
    weighted = {"pair1": {**PAIR, "weight": 2.0}, "pair2": PAIR}
    for loss, published in (
        (td.ATLoss(weighted), lambda s, t: standins.attention(s, t, 2)),
        (td.ATLoss(weighted, mode="paper"), paper_attention),
        (td.ChSimLoss(weighted), channels),
    ):
        same(within(loss), lambda s, t, published=published: 3 * published(s, t), *maps)
    with pytest.raises(ValueError, match="unknown mode"):
        td.ATLoss(weighted, mode="both")
    variance = torch.linspace(1e-3, 30, 4, dtype=F64).view(1, 4, 1, 1)

    def likelihood(s, t, v):
        return (0.5 * ((s - t) ** 2 / v + v.log())).mean()

    vid = within(td.VIDLoss({"pair": PAIR}))
    same(lambda s, t: vid((s, variance.to(s)), t), lambda s, t: likelihood(s, t, variance.to(s)), *maps)
    close(
        gradients(lambda v: vid((maps[0], v), maps[1]), variance),
        gradients(lambda v: likelihood(*maps, v), variance),
        1e-9,
    )
    review = within(td.HierarchicalContextLoss(*MODULES))
    same(lambda s, t: review((s, None), t), standins.review, *maps)

    layers = *standins.maps(((4, 8), (6, 5))), *standins.maps(((4, 6), (6, 6)), seed=9)
    loss = td.FSPLoss({"pair": {**FSP, "weight": 0.5}})

    def flow(s1, s2, t1, t2):
        return loss({"s0": {"output": s1}, "s1": {"output": s2}}, {"t0": {"output": t1}, "t1": {"output": t2}})

    same(flow, lambda *x: 0.5 * lengths(*x), *layers)


def test_contrastive_representations():
    torch.manual_seed(0)
    loss = td.CRDLoss("s", "empty", "t", 4, 40, 9, 40).double()
    assert set(loss.state_dict()) == {"params", "memory_v1", "memory_v2"}
    s, t = (F.normalize(randn(N, 4, seed=k)) for k in range(2))
    y, idx = torch.arange(N), torch.randint(40, (N, 10))
    idx[:, 0] = y
    scores = [(torch.einsum("nd,nkd->nk", x, bank[idx]) / 0.07).exp() for x, bank in
              ((s, loss.memory_v2), (t, loss.memory_v1))]  # fmt: skip
    c, expected = 9 / 40, 0.0
    for x in scores:
        x = x / (x.mean() * 40)
        expected -= ((x[:, :1] / (x[:, :1] + c + 1e-7)).log().sum() + (c / (x[:, 1:] + c + 1e-7)).log().sum()) / N
    given = {"s": {"output": s}, "empty": {"input": {"pos_idx": y, "contrast_idx": idx}}}
    got = loss(given, {"t": {"output": t}})
    assert got.shape == (1,)
    close([got[0]], [expected], 1e-6)
    with pytest.raises(ValueError, match="training samples"):
        td.CRDLoss("s", "empty", "t", 4, 40, 9, 41)


# ------------------------------------------------------------------------------------------------- against torchdistill


def installed():
    try:
        return importlib.import_module("torchdistill.losses.mid_level"), importlib.import_module(
            "torchdistill.losses.registry"
        )
    except ImportError as error:
        pytest.skip(f"pip install torchdistill torchvision ({error})")


def test_register_says_what_it_needs(monkeypatch):
    for name in ("torchdistill", "torchdistill.losses"):  # the latter may have been imported already
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install torchdistill torchvision"):
        td.register()
    with pytest.raises(ValueError, match="unknown loss 'NoSuchLoss'"):
        td.register(["NoSuchLoss"])


WHERE = {
    "student_module_path": "s", "student_module_io": "output", "teacher_module_path": "t", "teacher_module_io": "input",
}  # fmt: skip
OUTPUTS = {"student_output_path": "s", "teacher_output_path": "t"}
LINEAR = {"student_linear_path": "s", "teacher_linear_path": "t", "reduction": "batchmean"}
GAUSSIAN = {"type": "gaussian", "gamma": 0.4, "max_p": 2}
CONFIGURATIONS = [
    ("KDLoss", {**WHERE, "temperature": 4.0, "alpha": 0.5}, (N, V)),
    ("LogitStdKDLoss", {**WHERE, "temperature": 2.0, "alpha": 0.5, "beta": 9}, (N, V)),
    ("DISTLoss", {**WHERE, "tau": 4.0}, (N, V)),
    ("PKTLoss", WHERE, (N, V)),
    ("RKDLoss", {**OUTPUTS, "dist_factor": 1.0, "angle_factor": 2.0, "reduction": "mean"}, (N, V)),
    ("CCKDLoss", {**LINEAR, "kernel_config": GAUSSIAN}, (N, V)),
    ("SPKDLoss", {**OUTPUTS, "reduction": "batchmean"}, (3, 4, 5, 5)),
    ("ATLoss", {"at_pairs": {"pair": PAIR}, "mode": "code"}, (3, 4, 5, 5)),
    ("ATLoss", {"at_pairs": {"pair": PAIR}, "mode": "paper"}, (3, 4, 5, 5)),
    ("ChSimLoss", {"feature_pairs": {"pair": PAIR}}, (3, 4, 5, 5)),
]


@pytest.mark.parametrize("name, options, shape", CONFIGURATIONS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_registered_loss_is_theirs(name, options, shape, monkeypatch):
    theirs, registry = installed()
    if not hasattr(theirs, name):
        pytest.skip(f"this torchdistill has no {name}: pip install -U torchdistill")
    monkeypatch.setattr(registry, "MIDDLE_LEVEL_LOSS_DICT", dict(registry.MIDDLE_LEVEL_LOSS_DICT))
    td.register()
    ours = registry.get_mid_level_loss({"key": name, "kwargs": options})
    assert type(ours) is getattr(td, name)
    same(within(ours, TARGETS), within(getattr(theirs, name)(**options), TARGETS), randn(*shape), randn(*shape, seed=1))
