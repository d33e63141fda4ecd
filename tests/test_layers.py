"""Which layers are distilled, and how their outputs are had."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdkernels as kd
from kdkernels.features import FeatureCapture, MultiLayerLoss, layers_of, match_layers


class Block(nn.Module):
    def __init__(self, a: int, b: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(a, b, 3, stride, 1)
        self.more = nn.Sequential(nn.ReLU(), nn.Conv2d(b, b, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.more(self.conv(x))


class Net(nn.Module):
    """A stem, stages of blocks, and a head."""

    def __init__(self, width: int, depths: tuple[int, ...]):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(*(Block(width, width, 2 if i and not j else 1) for j in range(n)))
                for i, n in enumerate(depths)
            )
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


@pytest.fixture
def models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return Net(4, (1, 2, 1)), Net(6, (2, 2, 4))


X = torch.randn(2, 1, 8, 8)


def test_capture_is_the_models_own_output(models: tuple[nn.Module, nn.Module]) -> None:
    net = models[0]
    with FeatureCapture(net, ["stem", "stages.1.0"]) as capture:
        logits, features = capture(X)
        assert torch.equal(logits, net(X))
        assert torch.equal(features["stem"], net.stem(X))
        assert list(features) == ["stem", "stages.1.0"]
        features["stages.1.0"].sum().backward()  # in the graph
        assert net.stem.weight.grad is not None
    with pytest.raises(RuntimeError, match="closed"):
        capture(X)
    assert not net.stem._forward_hooks


def test_capture_keeps_nothing(models: tuple[nn.Module, nn.Module]) -> None:
    capture = FeatureCapture(models[0], ["stem"])
    _, features = capture(X)
    seen = weakref.ref(features["stem"])
    del features, _
    gc.collect()
    assert seen() is None
    with pytest.raises(RuntimeError):
        capture(torch.zeros(2, 3, 8, 8))
    assert capture._record.found is None
    models[0](X)  # outside of a call nothing is recorded
    assert capture._record.found is None


def test_capture_of_wrapped_models(models: tuple[nn.Module, nn.Module], tmp_path) -> None:
    net = models[0]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        logits, features = FeatureCapture(wrapped, ["stages.0.0"])(X)
        (logits.sum() + features["stages.0.0"].sum()).backward()
        assert net.stem.weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()


def test_a_copy_of_a_captured_model_is_its_own(models: tuple[nn.Module, nn.Module]) -> None:
    net = models[0]
    with FeatureCapture(net, ["stem"]) as capture:
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            net.head.register_forward_hook(lambda *_, other=other: other(torch.zeros_like(X)))
            assert torch.equal(capture(X)[1]["stem"], net.stem(X))


def test_capture_compiles_whole(models: tuple[nn.Module, nn.Module]) -> None:
    torch._dynamo.reset()
    capture = FeatureCapture(models[0], ["stem", "stages.1.1"])

    def step(x: torch.Tensor) -> torch.Tensor:
        logits, features = capture(x)
        return logits.sum() + features["stages.1.1"].square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), step(X))
    assert capture._record.found is None


def test_capture_says_what_was_changed_in_place() -> None:
    conv = nn.Conv2d(1, 3, 3)
    quiet, loud = nn.Sequential(conv, nn.ReLU()), nn.Sequential(conv, nn.ReLU(inplace=True))
    with pytest.warns(UserWarning, match="changed '0' in place"):
        _, features = FeatureCapture(loud, ["0"])(X)
    assert torch.equal(features["0"], conv(X).relu())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(FeatureCapture(quiet, ["0"])(X)[1]["0"], conv(X))
        with torch.inference_mode():
            FeatureCapture(loud, ["0"])(X)


def test_capture_made_after_compiling() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    compiled = torch.compile(net, backend="eager")
    compiled(X)
    with pytest.raises(RuntimeError, match="did not call '0': torch.compile keeps code"):
        FeatureCapture(compiled, ["0"])(X)


def test_capture_takes_the_first_tensor_of_a_tuple() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[None, torch.Tensor]:
            return None, x + 1

    net = nn.Sequential(Two())
    _, features = FeatureCapture(net, ["0"])(X)
    assert torch.equal(features["0"], X + 1)


def test_unknown_and_uncalled_layers(models: tuple[nn.Module, nn.Module]) -> None:
    with pytest.raises(KeyError, match=r"no layer 'stages.1.o'; there are 'stages.1"):
        FeatureCapture(models[0], ["stages.1.o"])
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    net.forward = lambda x: net["a"](x)
    with pytest.raises(RuntimeError, match="did not call 'b'"):
        FeatureCapture(net, ["a", "b"])(torch.zeros(1, 2))


def test_layers_to_choose_from(models: tuple[nn.Module, nn.Module]) -> None:
    assert layers_of(models[0]) == ["stages.0.0", "stages.1.0", "stages.1.1", "stages.2.0"]
    assert layers_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == ["0", "2"]
    bare = nn.Module()
    bare.a, bare.b = nn.Linear(2, 2), nn.ReLU()
    assert layers_of(bare) == ["a"]


def test_every_second_layer(models: tuple[nn.Module, nn.Module]) -> None:
    student, teacher = models  # 4 and 8 blocks
    assert match_layers(student, teacher, "every-2") == [("stages.1.0", "stages.1.1"), ("stages.2.0", "stages.2.3")]
    assert match_layers(student, teacher, "every-3") == [("stages.1.1", "stages.2.1")]
    assert match_layers(student, student, "every-1") == [(n, n) for n in layers_of(student)]


def test_before_downsampling(models: tuple[nn.Module, nn.Module]) -> None:
    expected = [("stages.0.0", "stages.0.1"), ("stages.1.1", "stages.1.1"), ("stages.2.0", "stages.2.3")]
    assert match_layers(*models, "before-downsample", batch=X) == expected


def test_stems_of_different_depth_are_paired_from_the_end() -> None:
    def convolutions(*strides: int) -> nn.Module:
        return nn.Sequential(*(nn.Conv2d(3, 3, 3, stride, 1) for stride in strides))

    pairs = match_layers(convolutions(2, 2), convolutions(1, 2, 2), "before-downsample", batch=torch.zeros(1, 3, 8, 8))
    assert pairs == [("0", "1"), ("1", "2")]


def test_the_most_sensitive_layers(models: tuple[nn.Module, nn.Module]) -> None:
    student, teacher = models
    with torch.no_grad():
        student.stages[1][0].more[1].weight.mul_(1e-4)
        student.stages[1][0].more[1].bias.zero_()
    labels = torch.tensor([1, 2])
    pairs = match_layers(student, teacher, "sensitivity", batch=X, loss=lambda z: F.cross_entropy(z, labels), count=3)
    assert [s for s, _ in pairs] == ["stages.0.0", "stages.1.1", "stages.2.0"]
    assert all(p.grad is None for p in student.parameters())
    assert not student.stages[0][0]._forward_hooks


def test_pairs_by_name(models: tuple[nn.Module, nn.Module]) -> None:
    assert match_layers(*models, [("stem", "stem")]) == [("stem", "stem")]
    with pytest.raises(KeyError, match="no layer 'stump'"):
        match_layers(*models, [("stem", "stump")])


@pytest.mark.parametrize("how, words", [("every-0", "how must be"), ("sensitivity", "batch="), ("deep", "how must be")])
def test_bad_ways(models: tuple[nn.Module, nn.Module], how: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        match_layers(*models, how)


def test_a_loss_over_layers(models: tuple[nn.Module, nn.Module]) -> None:
    student, teacher = models
    pairs = match_layers(student, teacher, "before-downsample", batch=X)
    adapters = [kd.Adapter(4, 6) for _ in pairs]
    attention = kd.AttentionTransferLoss()
    loss = MultiLayerLoss(pairs, [kd.hint_loss, attention, kd.hint_loss], weights=[1, 10, 2], adapters=adapters)
    _, s = FeatureCapture(student, [a for a, _ in pairs])(X)
    with torch.no_grad():
        _, t = FeatureCapture(teacher, [b for _, b in pairs])(X)
    got = loss(s, t)
    x, y = list(s.values()), list(t.values())
    expected = (
        kd.hint_loss(adapters[0](x[0]), y[0])
        + 10 * attention(adapters[1](x[1]), y[1])
        + 2 * kd.hint_loss(adapters[2](x[2]), y[2])
    )
    torch.testing.assert_close(got, expected)
    got.backward()
    assert all(p.grad is not None for p in loss.parameters())
    assert student.stem.weight.grad is not None
    with pytest.raises(KeyError, match="student's features have no layer"):
        loss({}, t)
    variational = kd.VariationalInformationLoss(6)
    learned = MultiLayerLoss(pairs, variational, adapters=adapters).parameters()
    assert any(p is variational.raw_variance for p in learned)
    with pytest.raises(ValueError, match="weights must have one entry a pair, 3; got 1"):
        MultiLayerLoss(pairs, kd.hint_loss, weights=[1.0])


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: MultiLayerLoss(("a", "b"), kd.hint_loss),
            r"pairs must be Sequence\[tuple\[str, str\]\], got tuple of str",
        ),
        (lambda: MultiLayerLoss([("a", "b")], kd.HintLoss), r"got the class HintLoss: HintLoss\(\)$"),
        (lambda: MultiLayerLoss([("a", "b")]), r"__init__\(\) missing 1 required positional argument: 'losses'"),
        (lambda: FeatureCapture(nn.ReLU(), ["a", 1]), r"names must be Iterable\[str\], got list of str, int"),
        (lambda: kd.hint_loss(X, X, adapter=kd.Adapter), "adapter must be a module, got the class Adapter"),
        (
            lambda: kd.hint_loss(X, X, adapter=kd.Adapter(2, 1)),
            r"this Adapter must have 2 channels; got shape \(2, 1, 8, 8\)",
        ),
        (
            lambda: kd.hint_loss(X[0], X[0], adapter=kd.Adapter(1, 1)),
            r"must be \(N, C, H, W\), or linear=True for \(\.\.\., D\)",
        ),
        (
            lambda: kd.fgd_loss(X, X, [X.new_zeros(0, 4)] * 2, global_context=kd.GlobalContext(2)),
            "global_context is for 2 channels; got shape",
        ),
        (lambda: kd.kl_div(X, X, scale_by_t2=numpy.bool_(True)), "scale_by_t2 must be True or False, got numpy's bool"),
    ],
)
def test_words_for_usual_mistakes(call: Callable[[], object], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        call()
