"""Every script in examples/ runs by itself, as a reader would run it."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kdkernels

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@functools.cache
def output(script: Path) -> str:
    # The package that is tested here, installed or not.
    package = Path(kdkernels.__file__).resolve().parents[1]
    paths = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_runs(script):
    assert output(script).strip()


def test_training_before_and_after_agree():
    found = re.search(r"largest difference: (\S+)", output(ROOT / "examples" / "train.py"))
    assert float(found[1]) < 1e-4
