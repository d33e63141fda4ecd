"""Launches as Triton's compiler sees them on a GPU, where a size of 1 is a constant and no tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from kdkernels.ops.registry import specs


def test_every_launch_passes_the_compilers_front_end() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("jit_launches.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert found["calls"] > sum(len(spec.cases) for spec in specs() if "triton" in spec.backends)
    assert found["kernels"]
    assert not found["problems"], "\n".join(found["problems"])
