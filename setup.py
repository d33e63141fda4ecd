"""Builds kdkernels._C with ninja: CPU kernels once per instruction set, CUDA kernels where nvcc is.

Nothing here needs torch. What cannot be built is left out with its reason, which `kdkernels info`
shows: without a C++ compiler the package runs on Triton and the reference, without nvcc on those
and the CPU kernels.

Environment:
  KDKERNELS_CUDA=0|1    leave CUDA out, or insist on it (default: built where nvcc is found)
  KDKERNELS_NATIVE=0    leave the whole extension out
  CXX, NVCC, CUDA_HOME  the compilers to use
  MAX_JOBS              how many compilers run at once (default: ninja's, by the number of cores)
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# Strict IEEE where it matters (NaN, infinities, signed zero), none of what only blocks vectorising.
COMMON_FLAGS = [
    *"-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math".split(),
    *"-fno-strict-aliasing -Wall".split(),
    # GCC 12 finds its own AVX-512 headers at fault; Clang does not know the flag that says not to.
    *"-Wno-maybe-uninitialized -Wno-unknown-warning-option".split(),
]
# What -march=x86-64-vN means, for compilers from before that name (GCC 11, Clang 12).
X86_LEVELS = {
    2: "-mcx16 -msahf -mpopcnt -msse3 -mssse3 -msse4.1 -msse4.2".split(),
    3: "-mavx -mavx2 -mbmi -mbmi2 -mf16c -mfma -mlzcnt -mmovbe".split(),
    4: "-mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl".split(),
}
CUDA_ARCHS = ("80", "90a", "100")
SEE_LOG = "`pip install -v` shows the compiler's words"


class Unavailable(Exception):
    """Why a part of the native build cannot be made here, and what to do about it."""


def compiles(cxx: str, *flags: str, source: str = "int main() { return 0; }") -> str | None:
    """None where the compiler makes a program of `source`, else its first complaint."""
    command = [*shlex.split(cxx), *flags, "-x", "c++", "-", "-o", os.devnull]
    try:
        done = subprocess.run(command, input=source, text=True, capture_output=True)
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return None
    words = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
    return words[0].strip() if words else f"it exited with {done.returncode}"


def find_cxx() -> str:
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(name)[0]):
            break
    else:
        what = f"CXX={asked} was not found" if asked else "no C++ compiler was found when the package was built"
        raise Unavailable(f"{what} (install g++ or clang++, then reinstall kdkernels)")
    problem = compiles(name, "-std=c++17")
    if problem:
        raise Unavailable(f"the C++ compiler {name} does not compile C++17 here: {problem}")
    include = sysconfig.get_path("include")
    if compiles(name, f"-I{include}", "-fsyntax-only", source='#include "Python.h"'):
        raise Unavailable(f"Python.h is not in {include} (install Python's headers, e.g. python3-dev, then reinstall)")
    return name


def cpu_targets(cxx: str) -> list[tuple[str, str, list[str]]]:
    """(target name, namespace, flags) of every CPU build, the plainest first.

    The order is also the link order: where the linker finds one inline function in several
    objects it keeps the first, which must be the one that every processor can run.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return [("cpu.generic", "kdk::cpu_generic", [])]
    named = compiles(cxx, "-march=x86-64-v4", "-fsyntax-only") is None
    targets = []
    spelled_out: list[str] = []
    for level, features in X86_LEVELS.items():
        spelled_out += features
        flags = [f"-march=x86-64-v{level}"] if named else list(spelled_out)
        if level == 4:
            flags = [*flags, "-mprefer-vector-width=512"]
        targets.append((f"cpu.x86-64-v{level}", f"kdk::cpu_v{level}", flags))
    return targets


def find_nvcc() -> str:
    wanted = os.environ.get("KDKERNELS_CUDA", "")
    if wanted == "0":
        raise Unavailable("CUDA kernels were left out by KDKERNELS_CUDA=0 when the package was built")
    asked = os.environ.get("NVCC")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    # The last are PyPI's packages of nvcc. Build isolation hides them from import, not from a look.
    packaged = Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/nvcc")
    for name in [asked] if asked else ["nvcc", f"{home}/bin/nvcc", *map(str, sorted(packaged, reverse=True))]:
        found = shutil.which(name)
        if found:
            return found
    reason = f"NVCC={asked} was not found" if asked else "nvcc was not found when the package was built"
    reason += " (install the CUDA toolkit or set NVCC, then reinstall kdkernels)"
    if wanted == "1":
        raise SystemExit(f"KDKERNELS_CUDA=1, but {reason}")
    raise Unavailable(reason)


def cuda_archs(nvcc: str) -> tuple[list[str], list[str]]:
    """The architectures to compile for, of those this nvcc knows, and the flags that say so."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    known = [a for a in CUDA_ARCHS if f"sm_{a.rstrip('a')}" in listed]  # it lists sm_90, and knows sm_90a then
    newest = max((a for a in known if a.isdigit()), key=int, default=None)
    if newest is None:
        raise Unavailable(f"{nvcc} does not compile for compute capability 8.0 or newer (install CUDA 12 or newer)")
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in known]
    # PTX of the newest plain architecture, for GPUs that come after this toolkit.
    flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return known, flags


def version_of(command: str) -> str:
    """The line of `command --version` that tells the version."""
    lines = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True).stdout.splitlines()
    return next((line.strip() for line in lines if "release" in line), lines[0].strip() if lines else command)


def ninja_command() -> list[str]:
    if importlib.util.find_spec("ninja"):
        import ninja

        command = [str(Path(ninja.BIN_DIR) / "ninja")]
    elif shutil.which("ninja"):
        command = ["ninja"]
    else:
        raise Unavailable("ninja was not found (pip install ninja, then reinstall kdkernels)")
    jobs = os.environ.get("MAX_JOBS")
    return [*command, "-j", jobs] if jobs else command


def join(words: list[str]) -> str:
    """Words of a command, for the shell that ninja starts and for ninja itself."""
    return " ".join(shlex.quote(w) for w in words).replace("$", "$$")


def path(p: Path) -> str:
    """A path where ninja expects one."""
    return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaFile:
    """build.ninja for everything that can be built here; `info` gets what cannot, and why."""

    def __init__(self, build_dir: Path, output: Path, info: dict[str, str], with_cuda: bool):
        if not importlib.util.find_spec("pybind11"):
            raise Unavailable("pybind11 was not found (pip install pybind11, then reinstall kdkernels)")
        import pybind11

        self.build_dir, self.info, self.objects = build_dir, info, []
        cxx = find_cxx()
        info["compiler"] = version_of(cxx)
        openmp = ["-fopenmp"]
        if compiles(cxx, *openmp):
            openmp = ["-fopenmp-simd"]
            info["openmp"] = f"{cxx} does not link OpenMP here; the CPU kernels run on one thread"
        self.lines = ["ninja_required_version = 1.5"]
        self.rule("cxx", shlex.split(cxx))
        system = [pybind11.get_include(), sysconfig.get_path("include")]
        module = [*COMMON_FLAGS, f"-I{CSRC}", *(w for p in system for w in ("-isystem", p))]
        link = [*shlex.split(cxx), *openmp, "-shared"]
        if sys.platform == "darwin":
            link += ["-undefined", "dynamic_lookup"]
        self.cuda = False
        if with_cuda:
            try:
                nvcc = find_nvcc()
                known, gencode = cuda_archs(nvcc)
            except Unavailable as reason:
                info["cuda"] = str(reason)
            else:
                self.cuda = True
                info["cuda_archs"] = ",".join(f"sm_{a}" for a in known)
                info["nvcc"] = version_of(nvcc)
                nvcc_command = [nvcc, "-ccbin", shlex.split(cxx)[-1]]
                self.rule("cuda", nvcc_command)
                # nvcc of PyPI's packages does not know where their own libraries lie.
                lib = Path(nvcc).resolve().parent.parent / "lib"
                link = [*nvcc_command, "-cudart", "static", f"-L{lib}", "-shared", "-Xcompiler", ",".join(openmp)]
        self.compile("cxx", CSRC / "module.cpp", "module", module)
        for target, namespace, flags in cpu_targets(cxx):
            for source in sorted(CSRC.glob("*/cpu.cpp")):
                self.compile("cxx", source, f"{source.parent.name}-{target}", [
                    *COMMON_FLAGS, *openmp, *flags, f"-I{CSRC}", f'-DKDK_TARGET="{target}"', f"-DKDK_NAMESPACE={namespace}",
                ])  # fmt: skip
        for source in sorted(CSRC.glob("*/cuda.cu")) if self.cuda else []:
            self.compile("cuda", source, f"{source.parent.name}-cuda", [
                *"-O3 -std=c++17 --expt-relaxed-constexpr -Xptxas -warn-spills".split(),
                "-Xcompiler", "-fPIC,-fvisibility=hidden,-fno-strict-aliasing",
                "--threads", str(min(len(known) + 1, os.cpu_count() or 1)),
                *gencode, f"-I{CSRC}", '-DKDK_TARGET="cuda"', "-DKDK_NAMESPACE=kdk::cuda",
            ])  # fmt: skip
        self.lines += ["rule link", f"  command = {join(link)} $in -o $out", "  description = link $out"]
        self.lines.append(f"build {path(output)}: link {' '.join(map(path, self.objects))}")
        build_dir.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text("\n".join(self.lines) + "\n")

    def rule(self, name: str, command: list[str]) -> None:
        self.lines += [
            f"rule {name}",
            f"  command = {join(command)} -MMD -MF $out.d $flags -c $in -o $out",
            f"  depfile = $out.d\n  deps = gcc\n  description = {name} $out",
        ]

    def compile(self, rule: str, source: Path, name: str, flags: list[str]) -> None:
        self.objects.append(self.build_dir / f"{name}.o")
        self.lines += [f"build {path(self.objects[-1])}: {rule} {path(source)}", f"  flags = {join(flags)}"]


def build_native(build_dir: Path, output: Path) -> dict[str, str]:
    """Builds the extension, or as much of it as goes; returns what _build_info.json says."""
    info: dict[str, str] = {}
    insisted = os.environ.get("KDKERNELS_CUDA") == "1"
    try:
        if os.environ.get("KDKERNELS_NATIVE") == "0":
            raise Unavailable("native kernels were left out by KDKERNELS_NATIVE=0 when the package was built")
        command = [*ninja_command(), "-C", str(build_dir)]
        output.parent.mkdir(parents=True, exist_ok=True)
        plan = NinjaFile(build_dir, output, info, with_cuda=True)
        # On a failure ninja goes on with what does not depend on it: the CPU kernels may be fine.
        failed = subprocess.run([*command, "-k", "1" if insisted else "0"], stdout=sys.stderr).returncode
        if failed and plan.cuda and not insisted:
            info.clear()
            NinjaFile(build_dir, output, info, with_cuda=False)
            info["cuda"] = f"compiling the CUDA kernels failed; {SEE_LOG}"
            failed = subprocess.run(command, stdout=sys.stderr).returncode
        if failed:
            raise Unavailable(f"compiling the native kernels failed; {SEE_LOG}")
    except Unavailable as reason:
        if insisted:
            raise SystemExit(f"KDKERNELS_CUDA=1 insists on CUDA kernels, but {reason}") from None
        info["native"] = str(reason)
        output.unlink(missing_ok=True)
    for key in ("native", "cuda", "openmp"):
        if key in info:
            print(f"kdkernels: {info[key]}", file=sys.stderr)
    return info


class BuildExtension(build_ext):
    def run(self) -> None:
        package = ROOT / "kdkernels" if self.inplace else Path(self.build_lib).resolve() / "kdkernels"
        build_dir = ROOT / "build" / "native" if self.inplace else Path(self.build_temp).resolve() / "native"
        info = build_native(build_dir, Path(self.get_ext_fullpath("kdkernels._C")).resolve())
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def get_outputs(self) -> list[str]:
        outputs = [Path(p) for p in super().get_outputs()]
        if not self.inplace:
            outputs.append(Path(self.build_lib) / "kdkernels" / "_build_info.json")
        return [str(p) for p in outputs if p.exists()]


class BuildPython(build_py):
    def run(self) -> None:
        # Families are found by looking: one that was renamed must not live on in an old build folder.
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "kdkernels", ignore_errors=True)
        super().run()


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("kdkernels._C", sources=[])],
        cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
    )
