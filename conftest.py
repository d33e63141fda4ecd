"""Which kdkernels the tests import: an in-place build if there is one, else what is installed.

pytest puts this folder on sys.path, where the plain source would hide an installed package with its
compiled kernels. Programs that the tests start are told the same through the environment.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
IN_PLACE = (ROOT / "kdkernels" / "_build_info.json").exists()


def _stale() -> bool:
    """Whether a source of the CPU kernels is newer than the extension that was built in place."""
    built = [p.stat().st_mtime for p in (ROOT / "kdkernels").glob("_C*.so")]
    sources = [p.stat().st_mtime for suffix in ("cpp", "h") for p in (ROOT / "csrc").rglob(f"*.{suffix}")]
    return bool(built and sources) and max(sources) > max(built)


def _choose() -> None:
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    if IN_PLACE:
        sys.path.insert(0, str(ROOT))
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    else:
        os.environ["PYTHONSAFEPATH"] = "1"  # `python -m` and `python -c` leave the current folder out
    if importlib.util.find_spec("kdkernels") is None:
        raise pytest.UsageError(
            "kdkernels is not installed here: pip install -c constraints.txt '.[test]' "
            "(or, to work on it: pip install -e '.[dev]')"
        )


_choose()


def pytest_sessionstart(session: pytest.Session) -> None:
    # Said at once: kernels that are called in another way than they know may crash.
    if IN_PLACE and _stale() and not hasattr(session.config, "workerinput"):
        writer = session.config.get_terminal_writer()
        writer.line("csrc is newer than the extension built in place: python setup.py build_ext --inplace", red=True)


def _version(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {name}"


def pytest_report_header() -> list[str]:
    from kdkernels import native

    info = native.build_info()
    kernels = ", ".join(filter(None, [native.cpu_target(), info.get("cuda_archs")])) or f"none: {info.get('native')}"
    where = f"{Path(native.__file__).parent} ({'built in place' if IN_PLACE else 'installed'})"
    return [
        f"kdkernels: {where}, kernels: {kernels}",
        f"versions: {', '.join(map(_version, ('torch', 'triton', 'numpy')))}",
    ]
