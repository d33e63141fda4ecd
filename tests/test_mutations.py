"""The suite notices a broken kernel. One mutant here, minutes' worth of them in `python tests/mutate.py`."""

from __future__ import annotations

import shutil

import mutate
import pytest


@pytest.mark.parametrize("mutant", mutate.MUTANTS, ids=lambda m: f"{m.backend}-{m.family}-{m.about}")
def test_the_list_follows_the_sources(mutant: mutate.Mutant) -> None:
    assert mutant.old in (mutate.ROOT / mutant.path).read_text(), f"{mutant.path} changed: mend tests/mutants.py"


@pytest.mark.slow
def test_a_mutant_is_killed() -> None:
    pytest.importorskip("pybind11")
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    assert mutate.killer(mutate.MUTANTS[0]) is not None
