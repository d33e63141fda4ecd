"""Wrong arguments to every public loss: the right value or an error that names the argument, never a crash.

Losses, and good arguments for them, come from the registry's cases; what is tried, and what a call may do, is wrong.py's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_properties import FUNCTIONS, cases_of, size
from wrong import Launches, replacements, trouble

# What messages call a pair of arguments by.
PAIRS = ("student", "teacher", "bank", "banks", "maps", "embeddings", "scores")


def good_for(name: str, argument: str = "") -> dict[str, Any]:
    """Arguments of a case that gives this one where there is any, in a small shape."""
    cases = cases_of(name)
    case = next((c for c in cases if argument in c.options), cases[0])
    shape = sorted(case.shapes, key=size)[min(1, len(case.shapes) - 1)]
    return {**case.make(shape, torch.Generator().manual_seed(0)), **case.options, "backend": "cpu"}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore:.*has no cpu kernel")
def test_a_loss_takes_or_names_what_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, launches = cases_of(name)[0].function, Launches(monkeypatch)
    found = [
        f"{argument} = {what}: {problem}"
        for argument, what, make in replacements(function, good_for(name))
        if (problem := trouble(function, good_for(name, argument), argument, make, also=PAIRS, launches=launches))
    ]
    assert not found, "\n".join([f"{len(found)} of {name}:", *found])
