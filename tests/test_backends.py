"""Which backend runs: what is asked for, what is chosen, and what is said where that cannot be."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from targets import GPU, TARGETS, Target

from kdkernels import BackendError, backends, kl_div, native, use_backend
from kdkernels.backends import resolve

X32, X16, X64 = (torch.zeros(2, 3, dtype=d) for d in (torch.float32, torch.float16, torch.float64))
NATIVE = bool(backends.library("cpu"))
needs_native = pytest.mark.skipif(not NATIVE, reason="no native kernels here: " + native.build_info().get("native", ""))


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backends, "environment", "auto")
    backends._unavailable.cache_clear()
    backends._note_fallback.cache_clear()
    yield
    monkeypatch.undo()
    backends._unavailable.cache_clear()
    backends._interpreting.cache_clear()
    backends._note_fallback.cache_clear()


@needs_native
def test_auto_takes_the_best_here() -> None:
    assert resolve("f", (X32, X32)) == "cpu"
    assert resolve("f", (X16, X32)) == "cpu"
    if GPU:
        assert resolve("f", (X32.cuda(),)) in ("cuda", "triton")


def test_float64_goes_to_the_reference() -> None:
    assert resolve("f", (X64, X64)) == "reference"
    assert resolve("f", (X32, X64)) == "reference"
    loss = kl_div(X64, X64)
    assert loss.dtype == torch.float64


def test_without_native_kernels_auto_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._libraries, "cpu", {})
    monkeypatch.setattr(native, "build_info", lambda: {"native": "no C++ compiler was found"})
    assert resolve("f", (X32, X32)) == "reference"
    with pytest.raises(
        BackendError, match="native cpu kernels are not in this installation: no C\\+\\+ compiler was found"
    ):
        resolve("f", (X32,), "cpu")


def test_the_call_is_stronger_than_the_context_and_that_than_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "environment", "triton")
    assert backends.requested() == "triton"
    with use_backend("reference"):
        assert backends.requested() == "reference"
        assert resolve("f", (X32,)) == "reference"
        if NATIVE:
            assert resolve("f", (X32,), "cpu") == "cpu"
        with use_backend("triton"):
            assert backends.requested() == "triton"
        assert backends.requested() == "reference"
    assert backends.requested() == "triton"


def test_the_environment_is_read_at_the_import() -> None:
    code = "from kdkernels import backends; print(backends.requested())"
    environment = {**os.environ, "KDKERNELS_BACKEND": "reference"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "reference"


def test_the_context_is_left_after_an_error() -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backends.requested() == "auto"


def test_auto_in_the_context_overrides_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "environment", "reference")
    with use_backend("auto"):
        assert backends.requested() == "auto"


@needs_native
def test_the_context_decides_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    real = backends.library("cpu")

    class Recorder:
        def __bool__(self) -> bool:
            return True

        def context(self, tensor: torch.Tensor) -> Any:
            return real.context(tensor)

        def call(self, name: str, *args: Any) -> None:
            ran.append(name)
            real.call(name, *args)

    monkeypatch.setitem(backends._libraries, "cpu", Recorder())
    with use_backend("reference"):
        kl_div(X32, X32)
    assert ran == []
    kl_div(X32, X32)
    assert ran == ["row_divergence_forward"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tensors_are_read_by_their_attributes_too(dtype: torch.dtype) -> None:
    """As with a torch that has no exchange table."""
    library = backends.library("cpu")
    if not library:
        pytest.skip(f"no native kernels here: {native.build_info().get('native')}")

    class Attributes:
        def __init__(self, x: torch.Tensor):
            self.x, self.shape, self.dtype = x, x.shape, x.dtype

        def data_ptr(self) -> int:
            return self.x.data_ptr()

        def stride(self) -> tuple[int, ...]:
            return self.x.stride()

    x = torch.arange(12.0).to(dtype)
    factor = torch.tensor([3.0])
    library.call("scale_in_place", Attributes(x), Attributes(factor), 1)
    assert torch.equal(x, (3 * torch.arange(12.0)).to(dtype))
    library.call("scale_in_place", x, factor, 1)
    assert torch.equal(x, (9 * torch.arange(12.0)).to(dtype))
    unknown = torch.zeros(12, dtype=torch.complex64)
    for tensor in (unknown, Attributes(unknown)):
        with pytest.raises(TypeError, match="the kernels have no such dtype"):
            library.call("scale_in_place", tensor, factor, 1)


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ValueError, match="unknown backend 'gpu': choose one of auto, cuda, triton, cpu, reference"),
        use_backend("gpu"),
    ):
        pass
    with pytest.raises(BackendError, match="'gpu': there is no backend of that name; choose one of auto, cuda"):
        kl_div(X32, X32, backend="gpu")
    monkeypatch.setattr(backends, "environment", "gpu")
    with pytest.raises(BackendError, match="there is no backend of that name"):
        kl_div(X32, X32)


def test_forced_and_impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        BackendError,
        match="kl_div cannot run on backend 'cuda': the cuda backend runs on 'cuda' tensors, and these are on 'cpu'",
    ):
        kl_div(X32, X32, backend="cuda")
    with use_backend("cuda"), pytest.raises(BackendError, match="the cuda backend runs on 'cuda' tensors"):
        kl_div(X32, X32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends._interpreting.cache_clear()
    with pytest.raises(BackendError, match="triton runs on GPU tensors, and these are on 'cpu' \\(TRITON_INTERPRET=1"):
        kl_div(X32, X32, backend="triton")
    if GPU:
        with pytest.raises(BackendError, match="the cpu backend runs on 'cpu' tensors, and these are on 'cuda'"):
            kl_div(X32.cuda(), X32.cuda(), backend="cpu")


def test_triton_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackendError, match="triton is not installed \\(pip install triton\\)"):
        kl_div(X32, X32, backend="triton")


class Refusing:
    """CUDA kernels whose every launch fails."""

    def context(self, tensor: torch.Tensor) -> tuple[int, ...]:
        return 0, 0

    def call(self, name: str, *args: Any) -> None:
        raise RuntimeError(f"{name}: CUDA driver version is insufficient for CUDA runtime version")


def test_cuda_kernels_that_do_not_start_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    why = r"do not start here: scale_in_place: CUDA driver version is insufficient .*update the driver"
    monkeypatch.setitem(backends._libraries, "cuda", Refusing())
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(backends._devices, "cuda", "cpu")  # tensors of this machine stand in for those of a GPU
    assert re.search(why, str(backends.unavailable("cuda", "cpu")))
    with pytest.raises(BackendError, match=f"kl_div cannot run on backend 'cuda': the CUDA kernels {why}"):
        kl_div(X32, X32, backend="cuda")
    monkeypatch.setattr(backends, "order", lambda device: ("cuda", "reference"))
    assert resolve("f", (X32,)) == "reference"


@pytest.mark.skipif(GPU or not backends.library("cuda"), reason="wants CUDA kernels and no GPU: KDKERNELS_CUDA=1")
def test_without_a_gpu_a_launch_is_an_error_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = backends.library("cuda")
    monkeypatch.setattr(kernels, "context", lambda tensor: (0, 0))
    assert "CUDA" in str(backends.does_not_start(kernels, torch.ones(1)))


def test_an_operation_that_a_backend_lacks_falls_back_and_says_so_once() -> None:
    with pytest.warns(UserWarning, match="odd_loss has no cuda kernel; another backend runs it"), use_backend("cuda"):
        assert resolve("odd_loss", (X32,), supported=("cpu", "reference")) in ("cpu", "reference")
    with warnings.catch_warnings(), use_backend("cuda"):
        warnings.simplefilter("error")
        assert resolve("odd_loss", (X32,), supported=("reference",)) == "reference"


@pytest.mark.parametrize("one", TARGETS, ids=str)
def test_backends_agree(one: Target) -> None:
    if reason := one.skip_reason():
        pytest.skip(reason)
    s, t = torch.randn(4, 50), torch.randn(4, 50)
    with use_backend(one.backend):
        loss = kl_div(s.to(one.device), t.to(one.device), temperature=2.0)
    torch.testing.assert_close(loss.cpu(), kl_div(s, t, temperature=2.0, backend="reference"), rtol=1e-5, atol=1e-6)


def test_view_materialises() -> None:
    x = torch.arange(24.0)[1:]
    assert torch.equal(native.View(x, (2, 3), (6, 2)).materialise(), torch.tensor([[1.0, 3, 5], [7, 9, 11]]))
