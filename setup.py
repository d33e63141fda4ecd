"""Builds kdkernels._C with ninja: CPU kernels once per instruction set, CUDA kernels where nvcc is.

Nothing here needs torch. Without a C++ compiler the install still succeeds, on the Triton and
reference backends, and kdkernels/_build_info.json keeps the reason for `kdkernels info`.

Environment:
  KDKERNELS_CUDA=0|1    leave CUDA out, or insist on it (default: built where nvcc is found)
  KDKERNELS_NATIVE=0    leave the whole extension out
  CXX, NVCC             compilers to use
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# Strict IEEE where it matters (NaN, infinities, signed zero), none of what only blocks vectorising.
COMMON_FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -fno-strict-aliasing -Wall".split()
CUDA_ARCHS = ("80", "90a", "100")


class Unavailable(Exception):
    """Why a part of the native build cannot be made here."""


def cpu_targets():
    """(target name, namespace, flags) of every CPU build, the plainest first.

    The order is also the link order: where the linker finds one inline function in several
    objects it keeps the first, which must be the one that every processor can run.
    """
    if platform.machine().lower() in ("x86_64", "amd64"):
        wide = ["-mprefer-vector-width=512"]
        return [
            (f"cpu.x86-64-v{n}", f"kdk::cpu_v{n}", [f"-march=x86-64-v{n}", *(wide if n == 4 else [])])
            for n in (2, 3, 4)
        ]
    return [("cpu.generic", "kdk::cpu_generic", [])]


def find_cxx():
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if shutil.which(name.split()[0]):
            return name
    raise Unavailable("no C++ compiler was found (install g++ or clang++, or set CXX)")


def find_nvcc():
    wanted = os.environ.get("KDKERNELS_CUDA", "")
    if wanted == "0":
        raise Unavailable("CUDA was left out by KDKERNELS_CUDA=0")
    home = os.environ.get("CUDA_HOME", os.environ.get("CUDA_PATH", "/usr/local/cuda"))
    for name in filter(None, (os.environ.get("NVCC"), "nvcc", f"{home}/bin/nvcc")):
        if shutil.which(name):
            return shutil.which(name)
    if wanted == "1":
        raise SystemExit("KDKERNELS_CUDA=1, but nvcc was found neither on PATH nor in CUDA_HOME")
    raise Unavailable("nvcc was not found when the package was built (install the CUDA toolkit, or set NVCC)")


def cuda_archs(nvcc):
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    known = [a for a in CUDA_ARCHS if not listed or f"sm_{a}" in listed]
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in known]
    newest = max((a for a in known if a.isdigit()), key=int)
    # PTX of the newest plain architecture, for GPUs that come after this toolkit.
    flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return known, flags


def ninja_command():
    try:
        import ninja

        return [str(Path(ninja.BIN_DIR) / "ninja")]
    except ImportError:
        if shutil.which("ninja"):
            return ["ninja"]
        raise Unavailable("ninja was not found (pip install ninja)") from None


def escape(text):
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_ninja(build_dir, output, info):
    """build.ninja for everything that can be built here; fills `info` with what cannot, and why."""
    import pybind11

    cxx = find_cxx()
    if subprocess.run([*cxx.split(), "-fopenmp", "-x", "c++", "-", "-o", os.devnull],
                      input="int main(){}", text=True, capture_output=True).returncode == 0:
        openmp = ["-fopenmp"]
    else:
        openmp = ["-fopenmp-simd"]
        info["openmp"] = f"{cxx} does not link OpenMP here; CPU kernels run on one thread"
    includes = [f"-I{CSRC}", f"-isystem {pybind11.get_include()}", f"-isystem {sysconfig.get_path('include')}"]
    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        f"  command = {cxx} -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = c++ $out",
    ]
    objects = []

    def compile_(rule, source, name, flags):
        obj = build_dir / f"{name}.o"
        objects.append(obj)
        lines.extend([f"build {escape(obj)}: {rule} {escape(source)}", f"  flags = {' '.join(flags)}"])

    module_flags = [*COMMON_FLAGS, *includes]
    link, link_flags = cxx, [*openmp, "-shared"]
    cuda_sources = sorted(CSRC.glob("*/cuda.cu"))
    cuda_objects = []
    try:
        nvcc = find_nvcc()
        if cuda_sources:
            known, gencode = cuda_archs(nvcc)
            info["cuda_archs"] = ",".join(f"sm_{a}" for a in known)
            module_flags.append(f"-DKDK_CUDA_ARCHS=\\\"{info['cuda_archs']}\\\"")
            lines += [
                "rule cuda",
                f"  command = {nvcc} -ccbin {cxx.split()[0]} -MMD -MF $out.d $flags -c $in -o $out",
                "  depfile = $out.d\n  deps = gcc\n  description = nvcc $out",
            ]
            cuda_objects = cuda_sources
            link, link_flags = f"{nvcc} -ccbin {cxx.split()[0]} -cudart static", ["-shared"] + [f"-Xcompiler {f}" for f in openmp]
    except Unavailable as reason:
        info["cuda"] = str(reason)

    compile_("cxx", CSRC / "module.cpp", "module", module_flags)
    for target, namespace, flags in cpu_targets():
        for source in sorted(CSRC.glob("*/cpu.cpp")):
            compile_("cxx", source, f"{source.parent.name}-{target}", [
                *COMMON_FLAGS, *openmp, *flags, f"-I{CSRC}",
                f"-DKDK_TARGET=\\\"{target}\\\"", f"-DKDK_NAMESPACE={namespace}"])
    for source in cuda_objects:
        compile_("cuda", source, f"{source.parent.name}-cuda", [
            "-O3 -std=c++17 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden,-fno-strict-aliasing",
            "-Xptxas -warn-spills", *gencode, f"-I{CSRC}",
            '-DKDK_TARGET=\\"cuda\\"', "-DKDK_NAMESPACE=kdk::cuda"])
    lines += [
        "rule link",
        f"  command = {link} {' '.join(link_flags)} $in -o $out",
        "  description = link $out",
        f"build {escape(output)}: link {' '.join(map(escape, objects))}",
    ]
    build_dir.mkdir(parents=True, exist_ok=True)
    (build_dir / "build.ninja").write_text("\n".join(lines) + "\n")


class NinjaBuild(build_ext):
    def run(self):
        info = {}
        package = ROOT / "kdkernels" if self.inplace else Path(self.build_lib).resolve() / "kdkernels"
        output = Path(self.get_ext_fullpath("kdkernels._C")).resolve()
        build_dir = (ROOT / "build" / "native") if self.inplace else Path(self.build_temp).resolve() / "native"
        try:
            if os.environ.get("KDKERNELS_NATIVE") == "0":
                raise Unavailable("native kernels were left out by KDKERNELS_NATIVE=0")
            ninja = ninja_command()
            output.parent.mkdir(parents=True, exist_ok=True)
            write_ninja(build_dir, output, info)
            done = subprocess.run([*ninja, "-C", str(build_dir)], stdout=sys.stderr)
            if done.returncode:
                if os.environ.get("KDKERNELS_CUDA") == "1":
                    raise SystemExit("the native build failed (see above) and KDKERNELS_CUDA=1 insists on it")
                raise Unavailable("compiling the native kernels failed; `pip install -v` shows the compiler's words")
        except Unavailable as reason:
            info["native"] = str(reason)
            output.unlink(missing_ok=True)
            print(f"warning: kdkernels is installed without native kernels: {reason}", file=sys.stderr)
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def get_outputs(self):
        return [p for p in super().get_outputs() if Path(p).exists()] + (
            [] if self.inplace else [str(Path(self.build_lib) / "kdkernels" / "_build_info.json")])


setup(ext_modules=[Extension("kdkernels._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
