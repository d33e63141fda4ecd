"""`kdkernels info`: what is installed, which backends run here, and what to do about the others."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import kdkernels
from kdkernels import backends, console, native
from kdkernels.bench.environment import cores, cpu_name, version

VARIABLES = (
    "KDKERNELS_BACKEND", "KDKERNELS_DEBUG", "KDKERNELS_CUDA", "KDKERNELS_NATIVE", "TRITON_INTERPRET", "TRITON_CACHE_DIR",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CXX", "NVCC",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def openmp_libraries(maps: Path = Path("/proc/self/maps")) -> list[str] | None:
    """The OpenMP run times in this process; two of them are two thread pools. None where that cannot be read."""
    try:
        text = maps.read_text()
    except OSError:
        return None
    return sorted(set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)\b[^\s/]*", text)))


def _remedy(backend: str, device: str, reason: str) -> str:
    """What to do about a backend that does not run, where something can be done."""
    build = native.build_info()
    if device == "cuda" and not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            return "this torch is a CPU build; with an NVIDIA or AMD GPU install torch's build for it"
        return "torch sees no GPU; check `nvidia-smi` (or `rocm-smi`) and CUDA_VISIBLE_DEVICES"
    if backend in ("cpu", "cuda") and "not in this installation" in reason:
        if "compiling" in reason or "could not be loaded" in reason:
            return "reinstall with `pip install -v --force-reinstall --no-deps .` and read the compiler's words"
        return (
            "install it, then kdkernels once more" if "native" in build or backend in build else "reinstall kdkernels"
        )
    if "not installed" in reason:
        return "pip install 'kdkernels[triton]'"
    return ""


def backend_table() -> list[dict[str, Any]]:
    """Whether each backend runs on tensors of each kind of device; why not and what to do."""
    gpu = torch.cuda.is_available()
    found = []
    for backend in backends.BACKENDS:
        for device in ("cpu", "cuda"):
            if (backend, device) in (("cpu", "cuda"), ("cuda", "cpu")):
                continue  # by definition
            # Without a GPU its backends are not asked: they would look for one.
            reason = "there is no GPU here" if device == "cuda" and not gpu else backends.unavailable(backend, device)
            row = {"backend": backend, "tensors": device, "available": reason is None, "reason": reason or ""}
            found.append({**row, "remedy": _remedy(backend, device, reason) if reason else ""})
    return found


def automatic(device: str) -> str | None:
    """What backend="auto" picks for float16, bfloat16 and float32 tensors of this device."""
    if device == "cuda" and not torch.cuda.is_available():
        return None
    return next(b for b in backends.order(device) if backends.unavailable(b, device) is None)


def devices() -> list[str]:
    names = [f"cpu: {cpu_name()}, {cores()} cores"]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        names.append(f"cuda:{i}: {p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return names


def collect() -> dict[str, Any]:
    """Everything that `kdkernels info` says."""
    build = native.build_info()
    pools = openmp_libraries()
    return {
        "kdkernels": kdkernels.__version__,
        "location": str(Path(kdkernels.__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "system": platform.platform(),
        "devices": devices(),
        "native": {
            "built": bool(native.cpu_target()),
            "cpu_target": native.cpu_target() or None,
            "cuda_archs": build.get("cuda_archs"),
            "notes": {k: v for k, v in build.items() if k != "cuda_archs"},
        },
        "backends": backend_table(),
        "auto": {device: automatic(device) for device in ("cpu", "cuda")},
        "requested": backends.requested(),
        "threads": torch.get_num_threads(),
        "openmp": pools,
        "second_thread_pool": None if pools is None else len(pools) > 1,
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _text(info: dict[str, Any]) -> None:
    built = info["native"]
    extension = f"CPU kernels for {built['cpu_target'].removeprefix('cpu.')}" if built["built"] else "not built"
    extension += f", CUDA kernels for {built['cuda_archs']}" if built["cuda_archs"] else ", no CUDA kernels"
    openmp = ", ".join(Path(p).name for p in info["openmp"] or []) or "none found"
    if info["second_thread_pool"]:
        openmp += "  (more than one thread pool: import torch before anything else that uses OpenMP)"
    lines = [
        ("kdkernels", f"{info['kdkernels']}  ({info['location']})"),
        ("python", f"{info['python']} on {info['system']}"),
        ("torch", info["torch"]),
        ("triton", info["triton"] or "not installed"),
        *(("device", d) for d in info["devices"]),
        ("extension", extension),
        *(("", f"{what}: {why}") for what, why in built["notes"].items()),
        ("threads", str(info["threads"])),
        ("OpenMP", openmp),
        ("auto picks", ", ".join(f"{b} for {d} tensors" for d, b in info["auto"].items() if b)),
        ("asked for", info["requested"]),
        ("environment", ", ".join(f"{k}={v}" for k, v in info["environment"].items()) or "none of ours is set"),
    ]
    print("\n".join(f"{name:12} {value}" for name, value in lines) + "\n")
    rows = [
        (b["backend"], b["tensors"], "yes" if b["available"] else "no", b["reason"], b["remedy"])
        for b in info["backends"]
    ]
    console.print_table("backends", ("backend", "tensors", "runs", "why not", "what to do"), rows)


def run(args: argparse.Namespace) -> int:
    """Always 0: nothing here is a failure."""
    info = collect()
    if args.json:
        print(json.dumps(info, indent=1))
    else:
        _text(info)
    return 0
