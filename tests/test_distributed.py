"""Losses over gloo ranks on the CPU, four of them and two pairs of them: what one process computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import torch


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_on_four_ranks_and_on_pairs(tmp_path: Path) -> None:
    """One test for all of tests/ranks.py: starting the processes is what costs."""
    torch.multiprocessing.spawn(ranks.run, args=(str(tmp_path),), nprocs=ranks.RANKS)
