"""What a result was measured on."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import kdkernels
from kdkernels import native


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {cores()} core{'s' if cores() > 1 else ''}"


def slug(device: torch.device) -> str:
    """The device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def _output(*command: str, cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=cwd)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """The commit of the checkout that is running, with "-dirty" where its code differs from it."""
    root = Path(kdkernels.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return os.environ.get("KDKERNELS_COMMIT")
    sha = _output("git", "rev-parse", "--short=12", "HEAD", cwd=root)
    if sha and _output("git", "status", "--porcelain", "--", "kdkernels", "csrc", "setup.py", cwd=root):
        sha += "-dirty"
    return sha


def nvcc_version() -> str | None:
    text = _output(os.environ.get("NVCC", "nvcc"), "--version") or ""
    found = re.search(r"release [\d.]+, V([\d.]+)", text)
    return found.group(1) if found else None


def describe(device: torch.device) -> dict[str, Any]:
    """The environment block of a result file."""
    block: dict[str, Any] = {
        "device": device_name(device),
        "device_type": device.type,
        "slug": slug(device),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "kdkernels": kdkernels.__version__,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "cores": cores(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "cpu_target": native.cpu_target() or None,
        "cuda_archs": native.build_info().get("cuda_archs"),
        "triton_interpreter": os.environ.get("TRITON_INTERPRET") == "1",
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        block |= {
            "capability": f"{major}.{minor}",
            "driver": _output(
                "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index or 0}"
            ),
            "cuda": torch.version.cuda or torch.version.hip,
            "nvcc": nvcc_version(),
        }
    return block


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes through a temporary file, so that a cut run leaves the last whole version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False, default=str) + "\n")
    partial.replace(path)
