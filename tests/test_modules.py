"""The losses as modules: the same values, options that are parameters and buffers, state and repr."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from targets import Target

from kdkernels import DistillationLoss, KLDivLoss, distillation_loss, kl_div


@pytest.fixture
def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    s, t = (torch.randn(4, 9, generator=generator) for _ in range(2))
    return s, t, torch.randint(0, 9, (4,), generator=generator)


def test_a_module_is_its_function(target: Target, batch: tuple[torch.Tensor, ...]) -> None:
    s, t, y = (x.to(target.device) for x in batch)
    loss = KLDivLoss(temperature=3.0, reduction="sum", backend=target.backend)
    assert torch.equal(loss(s, t), kl_div(s, t, temperature=3.0, reduction="sum", backend=target.backend))
    hard = DistillationLoss(temperature=2.0, alpha=0.5, label_smoothing=0.1, backend=target.backend)
    options = {"label_smoothing": 0.1, "backend": target.backend}
    assert torch.equal(hard(s, t, y), distillation_loss(s, t, y, 2.0, 0.5, **options))
    assert torch.equal(hard(s, t, y, 3.0), distillation_loss(s, t, y, 3.0, 0.5, **options))


def test_a_call_overrides_the_options(batch: tuple[torch.Tensor, ...]) -> None:
    s, t, y = batch
    loss = KLDivLoss(temperature=3.0)
    assert torch.equal(loss(s, t, temperature=1.0), kl_div(s, t))
    assert torch.equal(
        loss(s, t, labels=y.masked_fill(y > 3, -100)), kl_div(s, t, temperature=3.0, labels=y.masked_fill(y > 3, -100))
    )
    assert torch.equal(loss(s, t), kl_div(s, t, temperature=3.0))


def test_options_may_be_changed_later(batch: tuple[torch.Tensor, ...]) -> None:
    s, t, _ = batch
    loss = KLDivLoss(temperature=3.0)
    loss.temperature = 1.5
    assert torch.equal(loss(s, t), kl_div(s, t, temperature=1.5))


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_learnable_temperature(target: Target, shape: tuple[int, ...], batch: tuple[torch.Tensor, ...]) -> None:
    """An nn.Parameter as temperature is trained with the rest."""
    s, t, _ = (x.to(target.device) for x in batch)
    loss = KLDivLoss(temperature=torch.nn.Parameter(torch.full(shape, 2.0)), backend=target.backend).to(target.device)
    assert [n for n, _ in loss.named_parameters()] == ["temperature"]
    loss(s, t).backward()
    assert loss.temperature.grad.shape == shape
    numbers = [KLDivLoss(temperature=v, backend="reference")(s.double(), t.double()) for v in (2 - 1e-4, 2 + 1e-4)]
    torch.testing.assert_close(
        loss.temperature.grad.item(), float(numbers[1] - numbers[0]) / 2e-4, rtol=1e-4, atol=1e-5
    )
    torch.optim.SGD(loss.parameters(), lr=0.1).step()
    assert loss.temperature.item() != 2


def test_state_moves_and_loads(batch: tuple[torch.Tensor, ...]) -> None:
    s, t, y = batch
    weights = torch.rand(9)
    loss = DistillationLoss(class_weight=weights, teacher_temperature=torch.nn.Parameter(torch.tensor(2.0)))
    assert set(loss.state_dict()) == {"class_weight", "teacher_temperature"}
    other = DistillationLoss(class_weight=torch.zeros(9), teacher_temperature=torch.nn.Parameter(torch.tensor(1.0)))
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(s, t, y), loss(s, t, y))
    assert torch.equal(copy.deepcopy(loss)(s, t, y), loss(s, t, y))
    assert loss.to("meta").class_weight.device.type == "meta"


def test_repr_says_the_options() -> None:
    assert repr(KLDivLoss(temperature=4.0, reduction="sum")) == "KLDivLoss(temperature=4.0, reduction='sum')"
    assert repr(KLDivLoss()) == "KLDivLoss()"


@pytest.mark.parametrize("module", [KLDivLoss, DistillationLoss])
def test_every_option_of_the_function_is_one_of_the_module(module: type[torch.nn.Module]) -> None:
    parameters = inspect.signature(module.function).parameters.values()
    options = {p.name: p.default for p in parameters if p.default is not p.empty}
    loss = module(**options)
    for name, value in options.items():
        assert getattr(loss, name) == value


def test_options_that_are_none_of_the_functions_are_refused() -> None:
    with pytest.raises(TypeError, match="KLDivLoss has no option 'temprature'; did you mean 'temperature'"):
        KLDivLoss(temprature=4.0)
    with pytest.raises(TypeError, match="DistillationLoss has no option 'labels'; it has temperature, alpha, "):
        DistillationLoss(labels=torch.zeros(3))
    with pytest.raises(TypeError, match=r"KLDivLoss takes its options by name.* got 4\.0"):
        KLDivLoss(4.0)
    with pytest.raises(TypeError, match=r"when it is called, KLDivLoss\(\)\(\.\.\.\); got a tensor$"):
        KLDivLoss(torch.zeros(2, 3), torch.zeros(2, 3))


def test_in_a_larger_module(batch: tuple[torch.Tensor, ...]) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(9, 9)
            self.loss = KLDivLoss(temperature=2.0)

        def forward(self, x: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
            return self.loss(self.head(x), teacher)

    model = Model()
    model(batch[0], batch[1]).backward()
    assert model.head.weight.grad.abs().sum() > 0
    assert "(loss): KLDivLoss(temperature=2.0)" in repr(model)
