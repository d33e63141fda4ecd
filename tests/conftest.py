"""What every test shares: its backend, fresh random numbers, and memory that shows what nobody wrote."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from targets import GPU, SEED, TARGETS, seeded

# Small tensors gain nothing from a second thread, and lose much where the machine is busy. The tests of threads set
# their own number.
torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # `target`: everywhere; `fused`: everywhere but the reference. A mark `backends` leaves those that it names.
    mark = metafunc.definition.get_closest_marker("backends")
    named = [t for t in TARGETS if mark is None or t.backend in mark.args]
    for name in {"target", "fused"} & set(metafunc.fixturenames):
        if any(name in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")):
            continue
        metafunc.parametrize(name, [t for t in named if name == "target" or t.fused], ids=str)


def _worth_it(item: pytest.Item) -> bool:
    """Whether a test's parameters are among those that its mark `slow_takes` leaves to a slow target."""
    mark, call = item.get_closest_marker("slow_takes"), getattr(item, "callspec", None)
    if mark is None or call is None:
        return True
    chosen = mark.args[0]
    wanted = {name: call.params[name] for name in inspect.signature(chosen).parameters}
    return not any(getattr(x, "slow", False) for x in call.params.values()) or chosen(**wanted)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    worth = [_worth_it(item) for item in items]
    if not all(worth):
        config.hook.pytest_deselected(items=[item for item, kept in zip(items, worth) if not kept])
        items[:] = [item for item, kept in zip(items, worth) if kept]


@pytest.fixture(autouse=True)
def _runnable(request: pytest.FixtureRequest) -> None:
    for name in ("target", "fused"):
        if name in request.fixturenames:
            target = request.getfixturevalue(name)
            if reason := target.skip_reason():
                pytest.skip(f"{target}: {reason}")


def pytest_report_header() -> str:
    return f"kdkernels: KDKERNELS_SEED={SEED}, on {', '.join(f'{t.backend} ({t.device})' for t in TARGETS)}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        report.sections.append(("random numbers", f"KDKERNELS_SEED={SEED} draws the same ones again"))


@pytest.fixture
def device() -> str:
    return "cuda" if GPU else "cpu"


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Other numbers in every run; the seed is in the header, and below every failure."""
    return seeded(request.node.nodeid)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory from torch.empty is NaN, so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
