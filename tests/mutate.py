"""Breaks kernels one line at a time, in a copy of the repository, and shows which test notices.

    python tests/mutate.py                  all of them, in half an hour
    python tests/mutate.py cpu triton       those of these backends
    python tests/mutate.py triton dist      those of this family in Triton
    python tests/mutate.py --list

A mutant that no test kills is a hole in the suite, as is a control (nothing changed) that one does: exit status 1. A mutant whose line is no longer in
the source is an error too: the list, mutants.py, follows the kernels.
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

from mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ("cpu", "triton", "cuda_on_cpu")
CONTROLS = tuple(Mutant("row_divergence", backend, "nothing changed", "cpu.cpp", "", "") for backend in BACKENDS)
# Enough of the suite to kill a mutant that names no tests, and little enough to wait for.
TESTS = ("tests/test_numerics.py", "tests/test_traps.py", "tests/test_ops.py")
CHOSEN = (
    "(test_loss_and_gradients and ({0}-kl_div-float32 or {0}-kl_div-weight-float32 or {0}-kl_div-labels-float32 or "
    "{0}-distillation_loss-float32)) or test_long_rows or test_retained or test_learnable_temperatures"
)
# Whose kernels a family's tests call beside its own and those that scale.
BESIDE = {
    "scale": "row_divergence",
    "pairwise_distance": "triplet_angle",  # one entry for both
    "triplet_angle": "pairwise_distance",
    "graph_closure": "pairwise_distance",
}


def chosen(mutant: Mutant) -> list[str]:
    """pytest's arguments for the tests that are to notice."""
    if "::" in mutant.tests:
        file, name = mutant.tests.split("::")
        return ["-k", name, f"tests/{file}"]
    if mutant.tests:
        return ["-k", f"test_loss_and_gradients and {mutant.backend}-{mutant.tests}", TESTS[0]]
    return ["-k", CHOSEN.format(mutant.backend), *TESTS]


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


def build_extension(tree: Path, family: str) -> None:
    """A family's CPU kernels as the copy's kdkernels._C: for the plainest processor only, as setup.py optimises."""
    import pybind11

    cxx = os.environ.get("CXX", "g++").split()
    flags = "-O3 -std=c++17 -fPIC -shared -fopenmp -fvisibility=hidden -fno-math-errno -fno-trapping-math".split()
    # As the plainest kernels that setup.py makes: without the vectoriser long sums would be less accurate.
    flags += ["-march=x86-64-v2"] if platform.machine() in ("x86_64", "AMD64") else []
    flags += ["-fno-strict-aliasing", f"-I{tree / 'csrc'}"]
    flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags += ['-DKDK_TARGET="cpu.generic"', "-DKDK_NAMESPACE=kdk::cpu_generic"]
    families = {family, "scale", BESIDE.get(family, family)}
    sources = [tree / "csrc/module.cpp", *(tree / "csrc" / name / "cpu.cpp" for name in sorted(families))]
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
        path = tree / mutant.path
        text = path.read_text()
        if mutant.old not in text:
            raise SystemExit(f"{mutant.path} no longer holds {mutant.old!r} ({mutant.about}): mend tests/mutants.py")
        path.write_text(text.replace(mutant.old, mutant.new, 1))
        if mutant.backend == "cpu":
            build_extension(tree, mutant.family)
        (tree / "kdkernels" / "_build_info.json").touch()  # the copy is what the tests import
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=line", *chosen(mutant)],
            cwd=tree, text=True, capture_output=True,
            env={**os.environ, "KDKERNELS_TEST_BACKENDS": mutant.backend, "PYTHONPATH": str(tree), "CXX": os.environ.get("CXX", "g++")},
        )  # fmt: skip
        if missing := re.search(r"KeyError: '(\w+)'$", done.stdout, re.M):
            raise SystemExit(f"the copy has no kernel {missing[1]}, which {mutant.family}'s tests call: mend BESIDE")
        failed = re.search(r"^FAILED \S+::(\S+)", done.stdout, re.M)
        if failed:
            return failed[1]
        if done.returncode not in (0, 1) or " passed" not in done.stdout:
            raise SystemExit(f"pytest did not run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("of", nargs="*", help=f"backends ({', '.join(BACKENDS)}), families; default: all")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    given = set(options.of)
    if odd := given - set(BACKENDS) - {m.family for m in MUTANTS}:
        parser.error(f"neither a backend nor a family with mutants: {', '.join(sorted(odd))}")
    backends, families = given & set(BACKENDS) or set(BACKENDS), given - set(BACKENDS)
    listed = (*CONTROLS, *MUTANTS)
    mutants = [m for m in listed if m.backend in backends and (not families or m.family in families)]
    if options.list:
        print("\n".join(f"{m.backend:12} {m.about:55} {m.path}" for m in mutants))
        return 0
    wrong = 0
    for i, mutant in enumerate(mutants, 1):
        print(f"[{i}/{len(mutants)}] {mutant.backend:12} {mutant.family:18} {mutant.about:55}", end=" ", flush=True)
        name = killer(mutant)
        as_it_should = (name is None) == (mutant in CONTROLS)
        wrong += not as_it_should
        print(f"killed by {name}" if name else "alive", "" if as_it_should else "<-- WRONG", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
