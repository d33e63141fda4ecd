"""Builds one runner executable per kernel family and sanitizer, named after what went into it."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_on_cpu"
FLAGS = [
    *"-std=c++17 -O1 -g -fno-omit-frame-pointer -fno-strict-aliasing -pthread".split(),
    *"-Wall -Wextra -Wno-unknown-pragmas -Wno-unused-parameter".split(),
    f"-I{HERE / 'include'}",
    f"-I{HERE}",
    f"-I{CSRC}",
    "-DKDK_CUDA_ON_CPU",
]
# (flags of the kernels, flags of the run time, flags of the link). ThreadSanitizer must not look at
# the run time itself: its fibers share data by taking turns, which the kernels' threads do not.
SANITIZERS = {
    "address": ("-fsanitize=address,undefined -fno-sanitize-recover=all -DKDK_WITH_ASAN",) * 2
    + ("-fsanitize=address,undefined",),
    "thread": ("-fsanitize=thread -DKDK_WITH_TSAN", "-DKDK_WITH_TSAN", "-fsanitize=thread"),
}


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def ninja() -> list[str]:
    found = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
    return [found]


@functools.lru_cache
def unavailable(sanitizer: str = "address") -> str | None:
    """Why runners cannot be built here, and what to do about it; None where they can."""
    if not shutil.which(compiler().split()[0]):
        return f"{compiler()} was not found: install g++ (or set CXX) to run CUDA kernels on the CPU"
    if not shutil.which(ninja()[0]):
        return "ninja was not found: pip install ninja"
    with tempfile.TemporaryDirectory() as tmp:
        done = subprocess.run(
            [*compiler().split(), *SANITIZERS[sanitizer][2].split(), "-x", "c++", "-", "-o", f"{tmp}/probe"],
            input="int main() {}", text=True, capture_output=True,
        )  # fmt: skip
    if done.returncode:
        return f"{compiler()} cannot link -fsanitize={sanitizer}: install libasan, libubsan and libtsan"
    return None


def _key(sources: list[Path], *more: str) -> str:
    digest = hashlib.sha256("\0".join(more).encode())
    for path in sorted(sources):
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@functools.lru_cache
def _version() -> str:
    return subprocess.run([*compiler().split(), "--version"], capture_output=True, text=True).stdout


def families() -> dict[str, Path]:
    """Every csrc/<family>/cuda.cu, by the family's name."""
    return {path.parent.name: path for path in sorted(CSRC.glob("*/cuda.cu"))}


def build(sources: dict[str, Path], sanitizer: str = "address") -> dict[str, Path]:
    """The runner of each family, compiled if its like was never compiled before."""
    kernel_flags, runtime_flags, link_flags = SANITIZERS[sanitizer]
    extra = os.environ.get("KDK_CPU_CXXFLAGS", "")
    about = (_version(), " ".join(FLAGS), kernel_flags, runtime_flags, link_flags, extra)
    headers = [p for s in ("h", "cuh") for p in CSRC.rglob(f"*.{s}")]
    machine = sorted(HERE.glob("*.cpp"))
    common = [CSRC / "common" / "registry.h", CSRC / "common" / "tensor.h"]
    machine_key = _key([*machine, *HERE.rglob("*.h"), *common], *about)
    lines = ["ninja_required_version = 1.5", f"flags = {' '.join(FLAGS)} {extra}"]
    rule = "rule {}\n  command = {} {} $in -o $out\n  description = {} $out"
    cxx = compiler()
    lines += [
        rule.format("kernel", cxx, f"$flags {kernel_flags} -DKDK_TARGET='\"cuda\"' "
                    "-DKDK_NAMESPACE=kdk::cuda_on_cpu -x c++ -c", "kernel"),
        rule.format("machine", cxx, f"$flags {runtime_flags} -c", "c++"),
        rule.format("link", cxx, f"-pthread {link_flags}", "link"),
    ]  # fmt: skip
    objects = [f"{p.stem}-{sanitizer}-{machine_key}.o" for p in machine]
    lines += [f"build {o}: machine {p}" for o, p in zip(objects, machine, strict=True)]
    runners = {}
    for family, source in sources.items():
        key = _key([source, *headers], machine_key, *about)
        name = f"{family}-{sanitizer}-{key}"
        lines += [f"build {name}.o: kernel {source}", f"build {name}: link {name}.o {' '.join(objects)}"]
        runners[family] = CACHE / name
    if all(path.exists() for path in runners.values()):
        return runners
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _prune()
        plan = f"build-{sanitizer}-{os.getpid()}.ninja"
        (CACHE / plan).write_text("\n".join(lines) + "\n")
        done = subprocess.run([*ninja(), "-C", str(CACHE), "-f", plan], capture_output=True, text=True)
        (CACHE / plan).unlink()
        if done.returncode:
            raise RuntimeError(f"the CPU build of the CUDA kernels failed\n{done.stdout[-8000:]}{done.stderr[-2000:]}")
    return runners


def _prune() -> None:
    """What nobody has built or used for a day goes: keys never come back to it."""
    for path in CACHE.iterdir():
        if path.name != "lock" and not path.name.startswith(".") and time.time() - path.stat().st_atime > 86400:
            path.unlink(missing_ok=True)
