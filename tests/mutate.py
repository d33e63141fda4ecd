"""Breaks kernels one line at a time, in a copy of the repository, and shows which test notices.

    python tests/mutate.py                 all of them: some minutes
    python tests/mutate.py cpu triton      those of these backends
    python tests/mutate.py --list

A mutant that no test kills is a hole in the suite, as is a control (nothing changed) that one does: exit status 1. A mutant whose line is no longer in
the source is an error too: the list below follows the kernels.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutant(NamedTuple):
    backend: str
    about: str
    file: str
    old: str  # must occur; the first occurrence is replaced
    new: str


CPU, OP = "csrc/row_divergence/cpu.cpp", "kdkernels/ops/row_divergence/op.py"
ROW, LANES, BLOCK = (f"csrc/row_divergence/cpu_{part}.h" for part in ("row", "lanes", "block"))
TRITON = "kdkernels/ops/row_divergence/triton_looped.py"
CUDA, COMMON = "csrc/row_divergence/cuda_row.cuh", "csrc/common/cuda.cuh"
SOFTMAX = "csrc/common/softmax.h"
MUTANTS = (
    Mutant("cpu", "sign of the gradient", LANES, "wq[l] * eq[l] - wp[l] * ep[l]", "wp[l] * ep[l] - wq[l] * eq[l]"),
    Mutant("cpu", "no 1/T in the gradient", LANES, "per_q = static_cast<float>(kd_[l] * q.scale)", "per_q = kd_[l]"),
    Mutant("cpu", "student and teacher swapped", LANES, "kl_sums<false>(teacher_, student_);", "kl_sums<false>(student_, teacher_);"),
    Mutant("cpu", "no target in the cross-entropy's gradient", LANES, "with - own[l]", "with"),
    Mutant("cpu", "row weight left out of the loss", LANES, "kd_[l] = job_.kd * weight_[l] * up;", "kd_[l] = job_.kd * up;"),
    Mutant("cpu", "rows of a block not turned back", BLOCK, "x[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);", "x[1] = x[0];"),
    Mutant("cpu", "the last classes of a block not copied", BLOCK, "for (int64_t c = r < r4 ? c4 : 0; c < columns; ++c)", "for (int64_t c = r < r4 ? columns : 0; c < columns; ++c)"),
    Mutant("cpu", "sign of a long row's gradient", ROW, "wq * eq[i] - wp * ep[i]", "wp * ep[i] - wq * eq[i]"),
    Mutant("cpu", "student and teacher of a long row swapped", ROW, ": kl_sums(teacher_, student_", ": kl_sums(student_, teacher_"),
    Mutant("cpu", "earlier tiles not rescaled", SOFTMAX, "    z *= factor;\n", ""),
    Mutant("cpu", "labels not applied to the divisor", CPU, "const double w = job.row_weight(r);", "const double w = 1;"),
    Mutant("cpu", "T^2 on the loss but not on its gradient's temperature", OP, "2.0 * kd / scalars", "0.0 * kd / scalars"),
    Mutant("cpu", "a stored gradient handed out twice", "kdkernels/ops/scale/op.py", "get_current_graph_task_keep_graph():", "get_current_graph_task_keep_graph() and False:"),
    Mutant("triton", "sign of the divergence's two sides", TRITON, "tl.where(kind == 0, 1.0, -1.0)", "tl.where(kind == 0, -1.0, 1.0)"),
    Mutant("triton", "no 1/T in the gradient", TRITON, "kw[:, None] * (g * inv_s)", "kw[:, None] * g"),
    Mutant("triton", "earlier tiles not rescaled", TRITON, "z_s = z_s * c_s + ex", "z_s = z_s + ex"),
    Mutant("cuda_on_cpu", "sign of the gradient", CUDA, "k_s * fmaf(-et, t_to_s, fast_exp2(us))", "k_s * fmaf(et, t_to_s, fast_exp2(us))"),
    Mutant("cuda_on_cpu", "no 1/T in the gradient", CUDA, "r.kd_s = kd * q.inv_ts", "r.kd_s = kd"),
    Mutant("cuda_on_cpu", "a barrier missing in the block's reduction", COMMON, "    __syncthreads();\n", ""),
)  # fmt: skip
# Enough of the suite to kill them, and little enough to wait for.
TESTS = ("tests/test_numerics.py", "tests/test_traps.py", "tests/test_ops.py")
CHOSEN = (
    "(test_loss_and_gradients and ({0}-kl_div-float32 or {0}-kl_div-weight-float32 or {0}-kl_div-labels-float32 or "
    "{0}-distillation_loss-float32)) or test_long_rows or test_retained or test_learnable_temperatures"
)
CONTROLS = tuple(Mutant(backend, "nothing changed", CPU, "", "") for backend in ("cpu", "triton", "cuda_on_cpu"))


def copied(to: Path) -> None:
    to.mkdir()
    parts = ("kdkernels", "csrc", "tests", "conftest.py", "pyproject.toml")
    for source in (ROOT / part for part in parts if (ROOT / part).exists()):
        if source.is_dir():
            shutil.copytree(source, to / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, to / source.name)
    # What the emulator compiled is named after its sources: only what a mutant changes is compiled again.
    emulator = ROOT / "build" / "cuda_on_cpu"
    if emulator.exists():
        shutil.copytree(emulator, to / "build" / "cuda_on_cpu", dirs_exist_ok=True, copy_function=os.link)


def build_extension(tree: Path) -> None:
    """The mutated CPU kernels as the copy's kdkernels._C: for the plainest processor only, as setup.py optimises."""
    import pybind11

    cxx = os.environ.get("CXX", "g++").split()
    flags = "-O3 -std=c++17 -fPIC -shared -fopenmp -fvisibility=hidden -fno-math-errno -fno-trapping-math".split()
    # As the plainest kernels that setup.py makes: without the vectoriser long sums would be less accurate.
    flags += ["-march=x86-64-v2"] if platform.machine() in ("x86_64", "AMD64") else []
    flags += ["-fno-strict-aliasing", f"-I{tree / 'csrc'}"]
    flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags += ['-DKDK_TARGET="cpu.generic"', "-DKDK_NAMESPACE=kdk::cpu_generic"]
    sources = [tree / "csrc/module.cpp", tree / CPU, tree / "csrc/scale/cpu.cpp"]
    output = next(
        (tree / "kdkernels").glob("_C*.so"), tree / "kdkernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    )
    output.unlink(missing_ok=True)
    subprocess.run([*cxx, *flags, *map(str, sources), "-o", str(output)], check=True)


def killer(mutant: Mutant) -> str | None:
    """The first test that fails on the mutant, or None."""
    with tempfile.TemporaryDirectory(prefix="kdkernels-mutant-") as folder:
        tree = Path(folder) / "repository"
        copied(tree)
        path = tree / mutant.file
        text = path.read_text()
        if mutant.old not in text:
            raise SystemExit(f"{mutant.file} no longer holds {mutant.old!r} ({mutant.about}): mend tests/mutate.py")
        path.write_text(text.replace(mutant.old, mutant.new, 1))
        if mutant.backend == "cpu":
            build_extension(tree)
        (tree / "kdkernels" / "_build_info.json").touch()  # the copy is what the tests import
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=line", "-k", CHOSEN.format(mutant.backend), *TESTS],
            cwd=tree, text=True, capture_output=True,
            env={**os.environ, "KDKERNELS_TEST_BACKENDS": mutant.backend, "PYTHONPATH": str(tree), "CXX": os.environ.get("CXX", "g++")},
        )  # fmt: skip
        failed = re.search(r"^FAILED \S+::(\S+)", done.stdout, re.M)
        if failed:
            return failed[1]
        if done.returncode not in (0, 1) or " passed" not in done.stdout:
            raise SystemExit(f"pytest did not run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("backends", nargs="*", help="cpu, triton, cuda_on_cpu (default: all)")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    mutants = [m for m in (*CONTROLS, *MUTANTS) if not options.backends or m.backend in options.backends]
    if options.list:
        print("\n".join(f"{m.backend:12} {m.about:55} {m.file}" for m in mutants))
        return 0
    wrong = 0
    for i, mutant in enumerate(mutants, 1):
        print(f"[{i}/{len(mutants)}] {mutant.backend:12} {mutant.about:55}", end=" ", flush=True)
        name = killer(mutant)
        as_it_should = (name is None) == (mutant in CONTROLS)
        wrong += not as_it_should
        print(f"killed by {name}" if name else "alive", "" if as_it_should else "<-- WRONG", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
