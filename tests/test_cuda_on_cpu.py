"""The harness that runs CUDA kernels on the CPU: it does what CUDA promises, and it sees planted bugs."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cuda_on_cpu

SELFTEST = {"selftest": Path(cuda_on_cpu.__file__).parent / "selftest" / "cuda.cu"}
HERE = (0, 0)  # device, stream
BUGS = (
    "none block_barrier cluster_barrier slot_reused read_overrun write_overrun shared_overrun carved_overrun "
    "early_exit missing_lane uninitialised copy_wait last_barrier static_overrun divergent_barrier"
).split()


def library(sanitizer):
    if reason := cuda_on_cpu.unavailable(sanitizer):
        pytest.skip(reason)
    return cuda_on_cpu.Library(sanitizer, families=SELFTEST, first_seed=0)


@pytest.fixture(scope="module")
def address():
    lib = library("address")
    yield lib
    lib.close()


@pytest.fixture(scope="module")
def thread():
    lib = library("thread")
    yield lib
    lib.close()


# ------------------------------------------------------------------------------ what CUDA promises


def features_expected(blocks=3, n=64):
    v = torch.arange(n)
    lane, base = v % 32, v // 32 * 32
    half = lane < 16
    rows = torch.stack(
        [
            v ^ 1,
            torch.where(v % 8 + 3 < 8, v + 3, v),
            torch.where(v % 16 >= 2, v - 2, v),
            v // 8 * 8 + 5,
            ((base + (lane ^ 16)) * 1.5).long(),
            base,
            torch.where(half, base * 16 + 120, base + 31),
            torch.where(half, 0x0000AAAA, 0xAAAA0000 - (1 << 32)),
            (base == 0) * 2 + 1,
            torch.full_like(v, 32),
            torch.full_like(v, 1 + 2),
            torch.full_like(v, n * (n - 1) // 2),
            torch.full_like(v, n - 1),
            torch.tensor([0x11111111 << k if k < 3 else -0x77777778 for k in range(4)])[v % 4],
            v,
            torch.ones_like(v),
        ],
        dim=1,
    )
    rows = rows.expand(blocks, n, 16).clone()
    rows[:, :, 14] = torch.arange(blocks * n).view(blocks, n) + blocks
    return torch.cat([rows.flatten(), torch.tensor([blocks * n * (n - 1) // 2])]).int()


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_barriers_shuffles_votes_and_atomics(sanitizer, request):
    lib = request.getfixturevalue(sanitizer)
    out = torch.zeros(3 * 64 * 16 + 1, dtype=torch.int32)
    lib.call("features", torch.arange(64, dtype=torch.int32), out, *HERE)
    assert out.tolist() == features_expected().tolist()


def test_three_dimensional_grid(address):
    out = torch.zeros(12, 24, dtype=torch.int32)
    address.call("index3d", out, *HERE)
    assert torch.equal(out, torch.arange(12)[:, None].int() * 100 + torch.arange(24).int())


def test_half_and_bfloat16_round_as_torch_does(address):
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=torch.Generator().manual_seed(0))
    ties = (torch.arange(0, 0x7F800000, 0x1000 * 97) // 0x1000 * 0x1000) | 0x1000  # halfway for half
    x = torch.cat([bits, ties, ties + 0x7000]).int().view(torch.float32)
    small = torch.tensor([0.0, -0.0, 65504, 65519.99, 65520, 6e-8, 2.9e-8, 5.97e-8, 6.1e-5, torch.inf, -torch.inf])
    x = torch.cat([x, small, torch.linspace(-1e-4, 1e-4, 999), torch.linspace(-7e4, 7e4, 999)])
    x = x[~x.isnan()]
    h, b, back = x.half(), x.bfloat16(), torch.zeros_like(x)
    got_h, got_b = torch.zeros_like(h), torch.zeros_like(b)
    address.call("round_small", x, got_h, got_b, back, *HERE)
    assert torch.equal(got_h.view(torch.int16), h.view(torch.int16))
    assert torch.equal(got_b.view(torch.int16), b.view(torch.int16))
    torch.testing.assert_close(back, h.float() + b.float(), rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------ the bridge to Python


def test_strided_views_are_written_in_place(address):
    storage = torch.arange(60.0)
    view = storage.as_strided((3, 4), (2, 11), 5)
    expected = storage.clone()
    expected.as_strided((3, 4), (2, 11), 5).mul_(2)
    address.call("twice", view, *HERE)
    assert torch.equal(storage, expected)
    empty = torch.zeros(0, 3)
    address.call("twice", empty, *HERE)


def test_errors_keep_their_type(address):
    with pytest.raises(ValueError, match="x must have 2 dimensions, got 1"):
        address.call("twice", torch.zeros(3), *HERE)
    with pytest.raises(IndexError, match="too many rows"):
        address.call("twice", torch.zeros(101, 1), *HERE)
    with pytest.raises(ValueError, match="takes 3 arguments, got 2"):
        address.call("twice", torch.zeros(1, 1), 0)
    with pytest.raises(RuntimeError, match="twice: invalid device ordinal"):
        address.call("twice", torch.zeros(1, 1), 1, 0)
    with pytest.raises(ValueError, match="argument 1 must be an integer"):
        address.call("twice", torch.zeros(1, 1), 1.5, 0)
    with pytest.raises(AttributeError, match="no_such"):
        address.call("no_such")
    assert "planted" in address.entries()


def test_pretended_devices(address):
    facts = torch.zeros(3, dtype=torch.int64)
    address.call("device_facts", facts, 0)
    assert facts.tolist() == [132, 227 * 1024, 1]
    with address.pretend(arch=80, sms=7):
        address.call("device_facts", facts, 0)
        assert facts.tolist() == [7, 163 * 1024, 0]
        with pytest.raises(RuntimeError, match="planted: operation not supported"):
            address.call("planted", torch.ones(4, 128), torch.zeros(128), 2, 0, *HERE)


def test_results_that_depend_on_the_order_of_threads(address):
    with pytest.raises(cuda_on_cpu.NotDeterministic, match="argument 1, byte"):
        address.call("depends_on_order", torch.zeros(1, dtype=torch.int32), torch.zeros(8, dtype=torch.int32), *HERE)


# ------------------------------------------------------------------------------ planted bugs


def planted(lib, bug, cluster=2, rows=6):
    x = torch.randn(rows, 64 * cluster, generator=torch.Generator().manual_seed(1))
    out = torch.zeros(64 * cluster)
    lib.call("planted", x, out, cluster, BUGS.index(bug), *HERE)
    total = x[0]
    for row in x[1:]:
        total = total + row
    expected = total - total.max() + total.min() + total.roll(-64)
    return (out - expected).abs().max().item()


@pytest.mark.parametrize("cluster", [1, 2, 8])
def test_the_right_kernel_passes(address, cluster):
    assert planted(address, "none", cluster) < 1e-5


@pytest.mark.parametrize("cluster", [1, 3])
def test_the_right_kernel_passes_under_thread_sanitizer(thread, cluster):
    assert planted(thread, "none", cluster) < 1e-5


@pytest.mark.parametrize("bug", ["block_barrier", "cluster_barrier", "slot_reused", "last_barrier"])
def test_thread_sanitizer_names_the_line_of_a_race(thread, bug):
    with pytest.raises(cuda_on_cpu.SanitizerError, match=r"selftest/cuda\.cu:\d+") as caught:
        planted(thread, bug)
    assert caught.value.kind == "data race"
    assert "in kernel planted" in caught.value.report


@pytest.mark.parametrize("bug", ["block_barrier", "slot_reused"])
def test_orders_of_threads_show_a_race(address, bug):
    with pytest.raises(cuda_on_cpu.NotDeterministic):
        planted(address, bug)


@pytest.mark.parametrize(
    ("bug", "kind", "word"),
    [
        ("cluster_barrier", "use-after-poison", "READ of size 4"),  # of a block that has not begun
        ("read_overrun", "heap-buffer-overflow", "READ"),
        ("write_overrun", "heap-buffer-overflow", "WRITE of size 4"),
        ("carved_overrun", "use-after-poison", "WRITE of size 4"),
        ("static_overrun", "use-after-poison", "WRITE of size 4"),
        ("shared_overrun", "index 16 out of bounds", ""),
        ("last_barrier", "use-after-poison", "READ of size 4"),  # of a block that has left
    ],
)
def test_address_sanitizer_sees(address, bug, kind, word):
    with pytest.raises(cuda_on_cpu.SanitizerError, match=r"selftest/cuda\.cu:\d+") as caught:
        planted(address, bug)
    assert caught.value.kind.startswith(kind)
    assert word in caught.value.report
    assert planted(address, "none") < 1e-5  # a new process serves the next call


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize(
    ("bug", "words"),
    [
        ("early_exit", r"63 threads at the block's barrier cuda\.cu:\d+(.|\n)*1 threads returned, first \(7,0,0\)"),
        ("missing_lane", r"31 threads in a warp collective with mask 0xffffffff(.|\n)*selftest/cuda\.cu:\d+"),
        ("divergent_barrier", r"at different barriers: cuda\.cu:\d+ and cuda\.cu:\d+"),
    ],
)
def test_threads_that_cannot_go_on_are_reported(sanitizer, bug, words, request):
    lib = request.getfixturevalue(sanitizer)
    with pytest.raises(RuntimeError, match=words) as caught:
        planted(lib, bug)
    assert "planted: " in str(caught.value)
    assert planted(lib, "none") < 1e-5  # the same process serves the next call


@pytest.mark.parametrize("bug", ["uninitialised", "copy_wait"])
def test_memory_that_was_not_written_is_nan(address, bug):
    assert not planted(address, bug) < 1e-5


@pytest.mark.skipif(not os.environ.get("KDK_CPU_RATES"), reason="set KDK_CPU_RATES=1 to measure how often a race shows")
def test_how_often_orders_show_a_race(address, monkeypatch, capsys):
    with capsys.disabled():
        for bug in ("block_barrier", "cluster_barrier", "slot_reused", "last_barrier", "copy_wait"):
            seen = 0
            for first in range(20):
                monkeypatch.setattr(address, "first_seed", first * 4)
                try:
                    seen += not planted(address, bug) < 1e-5
                except (cuda_on_cpu.NotDeterministic, cuda_on_cpu.SanitizerError):
                    seen += 1
            print(f"{bug}: {seen} of 20")
            assert seen, f"no order of threads shows {bug}"


# ------------------------------------------------------------------------------ the real kernels


def test_every_family_builds_and_exports():
    if reason := cuda_on_cpu.unavailable():
        pytest.skip(reason)
    lib = cuda_on_cpu.Library()
    assert not lib.families or lib.entries()
    lib.close()
