"""What is built where, what the source distribution holds, and what an install without a compiler does."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

import kdkernels

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    """setup.py, which does nothing when it is only imported."""
    spec = importlib.util.spec_from_file_location("kdkernels_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No compiler on PATH and no wish in the environment; returns the only folder on PATH."""
    for name in ("CXX", "NVCC", "KDKERNELS_CUDA", "KDKERNELS_NATIVE", "MAX_JOBS", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    return tmp_path


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


# ---- setup.py ----


def test_without_a_compiler(setup, bare):
    with pytest.raises(setup.Unavailable, match=r"no C\+\+ compiler was found .*install g\+\+"):
        setup.find_cxx()


def test_a_compiler_that_was_asked_for_is_not_replaced(setup, bare, monkeypatch):
    program(bare / "g++", "exit 0")
    monkeypatch.setenv("CXX", "special-g++ -m64")
    with pytest.raises(setup.Unavailable, match=r"CXX=special-g\+\+ -m64 was not found"):
        setup.find_cxx()


def test_a_broken_compiler_is_quoted(setup, bare):
    program(bare / "c++", "echo 'cc1plus: error: out of cheese' >&2; exit 1")
    with pytest.raises(setup.Unavailable, match=r"does not compile C\+\+17 here: cc1plus: error: out of cheese"):
        setup.find_cxx()


def test_without_python_headers(setup, bare):
    program(bare / "c++", 'case "$*" in *-fsyntax-only*) exit 1;; esac')
    with pytest.raises(setup.Unavailable, match="python3-dev"):
        setup.find_cxx()


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="the levels are x86-64's")
def test_old_compilers_get_the_levels_spelled_out(setup, bare):
    program(bare / "new", "exit 0")
    program(bare / "old", 'case "$*" in *x86-64-v*) exit 1;; esac')
    new, old = setup.cpu_targets(str(bare / "new")), setup.cpu_targets(str(bare / "old"))
    assert [t[:2] for t in new] == [t[:2] for t in old]
    assert [t[0][-2:] for t in new] == ["v2", "v3", "v4"], "the plainest first"
    assert new[1][2] == ["-march=x86-64-v3"]
    assert not any("march" in flag for target in old for flag in target[2])
    assert {"-msse4.2", "-mavx2", "-mavx512f"} <= set(old[2][2])
    assert "-mavx2" not in old[0][2]


def test_other_processors_get_one_plain_build(setup, monkeypatch):
    monkeypatch.setattr(setup.platform, "machine", lambda: "aarch64")
    assert setup.cpu_targets("c++") == [("cpu.generic", "kdk::cpu_generic", [])]


def test_where_nvcc_is_looked_for(setup, bare, monkeypatch):
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(bare / "site"))
    with pytest.raises(setup.Unavailable, match="nvcc was not found .*install the CUDA toolkit or set NVCC"):
        setup.find_nvcc()
    packaged = program(bare / "site/nvidia/cu13/bin/nvcc", "exit 0")
    assert setup.find_nvcc() == str(packaged)
    home = program(bare / "cuda/bin/nvcc", "exit 0")
    assert setup.find_nvcc() == str(home)
    on_path = program(bare / "nvcc", "exit 0")
    assert setup.find_nvcc() == str(on_path)
    monkeypatch.setenv("NVCC", str(home))
    assert setup.find_nvcc() == str(home)


def test_cuda_can_be_left_out_or_insisted_on(setup, bare, monkeypatch):
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(bare / "site"))
    monkeypatch.setenv("KDKERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match="KDKERNELS_CUDA=1, but nvcc was not found"):
        setup.find_nvcc()
    program(bare / "nvcc", "exit 0")
    monkeypatch.setenv("KDKERNELS_CUDA", "0")
    with pytest.raises(setup.Unavailable, match="KDKERNELS_CUDA=0"):
        setup.find_nvcc()


def test_architectures_are_those_nvcc_knows(setup, tmp_path):
    twelve = program(tmp_path / "12", "echo sm_80 sm_90")
    known, flags = setup.cuda_archs(str(twelve))
    assert known == ["80", "90a"]
    assert flags[-1] == "-gencode=arch=compute_80,code=compute_80", "newer GPUs need PTX of a plain architecture"
    thirteen = program(tmp_path / "13", "echo sm_75 sm_80 sm_90 sm_100 sm_120")
    assert setup.cuda_archs(str(thirteen))[0] == ["80", "90a", "100"]
    ancient = program(tmp_path / "10", "echo sm_70")
    with pytest.raises(setup.Unavailable, match="CUDA 12 or newer"):
        setup.cuda_archs(str(ancient))


def test_reasons_reach_build_info(setup, bare, monkeypatch):
    output = bare / "_C.so"
    output.write_text("an older build")
    monkeypatch.setenv("KDKERNELS_NATIVE", "0")
    assert "KDKERNELS_NATIVE=0" in setup.build_native(bare / "build", output)["native"]
    assert not output.exists(), "what is there must be what was built now"
    monkeypatch.delenv("KDKERNELS_NATIVE")
    assert "C++ compiler" in setup.build_native(bare / "build", output)["native"]
    monkeypatch.setenv("KDKERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match=r"KDKERNELS_CUDA=1 insists on CUDA kernels, but no C\+\+ compiler"):
        setup.build_native(bare / "build", output)


def test_without_ninja(setup, bare, monkeypatch):
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    assert "pip install ninja" in setup.build_native(bare / "build", bare / "_C.so")["native"]


def test_paths_survive_ninja_and_the_shell(setup):
    assert setup.path(Path("/a b/c$d:e")) == "/a$ b/c$$d$:e"
    assert setup.join(["-I/a b", '-DX="y"', "$z"]) == "'-I/a b' '-DX=\"y\"' '$$z'"


def test_reasons_are_what_users_read(monkeypatch):
    from kdkernels import backends, native

    monkeypatch.setattr(native, "build_info", lambda: {"cuda": "nvcc was not found"})
    monkeypatch.setattr(backends, "library", lambda name: {})
    backends._unavailable.cache_clear()
    try:
        reason = backends.unavailable("cuda", "cuda")
    finally:
        backends._unavailable.cache_clear()
    assert reason is not None and "nvcc was not found" in reason


# ---- what is published ----


def requirements() -> dict[str, list[str]]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"": project["dependencies"], **project["optional-dependencies"]}


def test_ranges_are_open_and_pins_are_complete():
    pins = [
        p.split(";")[0].strip() for p in (ROOT / "constraints.txt").read_text().splitlines() if p[:1] not in ("#", "")
    ]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[\w.]+", p) for p in pins)
    assert pins == sorted(pins, key=lambda p: p.split("==")[0]), "easier to read in order"
    pinned = {p.split("==")[0] for p in pins}
    for extra, wanted in requirements().items():
        for line in wanted:
            assert not re.search(r"==|<|~=", line.split(";")[0]), f"{line} shuts out newer versions"
            name = re.match(r"[\w.-]+", line)
            assert name is not None
            assert name[0] == "kdkernels" or name[0].lower() in pinned, f"constraints.txt lacks {name[0]} of [{extra}]"


def test_installed_metadata():
    try:
        about = importlib.metadata.metadata("kdkernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("kdkernels is built in place, not installed")
    assert about["Version"] == kdkernels.__version__
    assert about["License-Expression"] == "Apache-2.0"
    assert {"demo", "bench", "test", "docs", "dev", "triton"} <= set(about.get_all("Provides-Extra"))
    scripts = importlib.metadata.entry_points(group="console_scripts", name="kdkernels")
    assert [s.value for s in scripts] == ["kdkernels.cli:main"]


def test_package_data_is_there():
    package = Path(kdkernels.__file__).parent
    assert (package / "py.typed").exists()
    assert (package / "_build_info.json").exists()
    assert (package / "ops/row_divergence/README.md").exists()


def test_documents_agree_with_the_tree():
    readme = (ROOT / "README.md").read_text()
    for command in ('".[demo]" && kdkernels demo', '".[test]" && pytest'):
        assert f"\npip install -c constraints.txt {command}\n" in readme
    for document in [*ROOT.glob("*.md"), *(ROOT / "kdkernels").rglob("*.md"), *(ROOT / "tests").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#:\s]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name} links to {link}"
    assert f"## {kdkernels.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_wheels_have_the_toolkit_of_the_other_checks():
    workflow = ROOT / ".github/workflows/wheels.yml"
    if not workflow.exists():
        pytest.skip("workflows are not part of the source distribution; run this in a checkout")
    pinned = dict(re.findall(r"(nvidia-[a-z-]+)==([\d.]+)", workflow.read_text()))
    here = (ROOT / ".ci/run").read_text()
    nvcc = re.search(r"nvidia-cuda-\{(.*)\}==([\d.]+) nvidia-nvvm==([\d.]+) nvidia-cuda-cccl==([\d.]+)", here)
    assert nvcc is not None
    expected = {f"nvidia-cuda-{part}": nvcc[2] for part in nvcc[1].split(",")}
    assert pinned == {**expected, "nvidia-nvvm": nvcc[3], "nvidia-cuda-cccl": nvcc[4]}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, made from a copy so that nothing is written into the working tree."""
    pytest.importorskip("setuptools")
    at = tmp_path_factory.mktemp("sdist")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    for name in listed.stdout.strip("\0").split("\0"):
        if (ROOT / name).exists():
            (at / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (at / "source" / name).write_bytes((ROOT / name).read_bytes())
    # Files of an earlier build in place, which must stay out.
    for name in ("_build_info.json", "_C.abi3.so"):
        (at / "source" / "kdkernels" / name).write_text("{}")
    code = f"import setuptools.build_meta as b; b.build_sdist({str(at)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=at / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(at.glob("*.tar.gz"))


def test_sdist_holds_all_that_a_build_and_the_tests_need(sdist: Path):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    tracked = {f for f in listed if (ROOT / f).exists() and not f.startswith((".git", ".github"))}
    assert not tracked - names, "MANIFEST.in leaves these out"
    assert not [n for n in names if n.endswith((".so", ".o", ".pyc", "_build_info.json"))]


@pytest.mark.slow
def test_sdist_installs_and_runs_without_a_compiler(sdist: Path, tmp_path: Path):
    pytest.importorskip("pip")
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "PYTHONPATH", "KDKERNELS_BACKEND")}
    environment |= {"PYTHONSAFEPATH": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    installed = tmp_path / "site"
    (tmp_path / "bin").mkdir()
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-t", str(installed)]
    done = subprocess.run(
        [*command, str(sdist)], env={**environment, "PATH": str(tmp_path / "bin")}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not list(installed.glob("kdkernels/_C*"))
    script = """
import sys
# Of a checkout that is installed with -e: it would find the extension there that is missing here.
sys.meta_path = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")]
import torch, kdkernels
from kdkernels import native
assert kdkernels.__file__.startswith(sys.argv[1]), kdkernels.__file__
s, t = torch.randn(4, 10, requires_grad=True), torch.randn(4, 10)
kdkernels.kl_div(s, t, temperature=2.0).backward()
assert s.grad.isfinite().all() and s.grad.any()
try:
    kdkernels.kl_div(s, t, backend="cpu")
except kdkernels.BackendError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(installed)], env={**environment, "PYTHONPATH": str(installed)}, cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler was found" in done.stdout
    assert "install g++" in done.stdout
