"""The bench: its arithmetic on made-up times, its gate on kernels made wrong, its files. Nothing here depends on speed."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy

from kdkernels import backends
from kdkernels.bench import accuracy, environment, gate, memory, peers, readme, results, runner, scaling, select, timing
from kdkernels.ops.registry import Case, specs

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


def test_noise_that_hits_a_whole_round_cancels_in_the_ratio():
    rounds = timing.Rounds({"ours": [1.0, 7.0, 2.0, 100.0], "eager": [3.0, 21.0, 6.0, 300.0]})
    assert rounds.ratio("ours", "eager").record() == [3.0, 3.0, 3.0]
    assert rounds.ratio("eager", "ours").median == pytest.approx(1 / 3)
    assert rounds.time("ours").record() == [1.75, 4.5, 30.25]


def test_contenders_take_turns_and_the_first_place_goes_round():
    turns: list[str] = []

    def timer(call, repeats):
        turns.append(call())
        return 1.0

    calls = {name: (lambda name=name: name) for name in "abc"}
    rounds = timing.interleave(calls, timer, seconds=0.0, min_rounds=6, clock=lambda: 0.0 if len(turns) < 7 else 1.0)
    assert [len(rounds.seconds[n]) for n in "abc"] == [6, 6, 6]
    played = ["".join(turns[6 + 3 * i : 9 + 3 * i]) for i in range(6)]
    assert [sorted(p) for p in played] == [["a", "b", "c"]] * 6
    assert [p[0] for p in played] == ["a", "b", "c", "c", "a", "b"]


def test_short_calls_are_repeated_in_a_turn_and_long_ones_are_not():
    seen: dict[str, int] = {}
    seconds = {"short": 1e-5, "long": 1.0}

    def timer(call, repeats):
        seen[call()] = repeats
        return seconds[call()]

    timing.interleave({n: (lambda n=n: n) for n in seconds}, timer, seconds=1.0, min_rounds=2, max_rounds=2)
    assert seen["long"] == 1
    assert seen["short"] == 1250  # 1 s over 40 turns of two


def test_throughput_and_floor():
    assert timing.throughput(6_000_000_000, 2.0) == 3.0
    row = runner.plan([(toy.spec(), toy.spec().cases[0])], CPU, lambda own: own, lambda label: label == "small")[0]
    rounds = timing.Rounds({"kdkernels[cpu]": [0.002] * 5, "floor": [0.001] * 5, "eager": [0.008] * 5})
    out = runner.record(
        row, "forward", runner.Contender("kdkernels[cpu]"), 10_000_000, CPU, rounds, rounds, (900, 1000)
    )
    assert out["ms"] == 2.0
    assert out["gbs"] == 5.0
    assert results.ratio(out, "floor") == 0.5
    assert results.ratio(out, "eager") == 4.0
    assert (out["peak_bytes"], out["extra_bytes"]) == (900, 0)
    timing.floor_probe(1200, CPU)()


def test_peak_memory_counts_temporaries_and_results():
    x = torch.ones(1000)
    assert memory.peak_bytes(lambda: (x + x) * x, CPU) == 8000
    assert memory.peak_bytes(lambda: x.add_(x), CPU) == 0


def test_errors_are_measured_against_the_exact_value_and_the_bar_grows_with_the_yardstick():
    exact = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    near = torch.tensor([1.0, -2.0, 1e-6])
    assert accuracy.relative_error(near, exact) == pytest.approx(5e-7, rel=1e-3)
    error, bar = accuracy.compare(near, exact, 0.0)
    assert error > bar
    error, bar = accuracy.compare(near, exact, 3e-7)
    assert error < bar == pytest.approx(1.2e-6)
    rounded = torch.tensor([1 / 3], dtype=torch.float64)
    error, bar = accuracy.compare(rounded.bfloat16(), rounded, 0.0)
    assert 0 < error <= bar


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_must_be_at_the_same_place(value):
    exact = torch.tensor([1.0, value], dtype=torch.float64)
    assert accuracy.compare(exact.float(), exact, 0.0)[0] == 0
    for other in (torch.tensor([value, 1.0]), torch.tensor([1.0, 5.0]), -exact.float()):
        if not (math.isnan(value) and other is not exact and torch.equal(other.isnan(), exact.isnan())):
            assert accuracy.compare(other, exact, 1.0)[0] == math.inf


@pytest.fixture
def everywhere(monkeypatch):
    """Toy kernels run on any machine, with native kernels or without."""
    monkeypatch.setattr(backends, "unavailable", lambda backend, device: None)


def _rows(spec, **options):
    planned = runner.plan([(spec, spec.cases[0])], CPU, lambda own: own, lambda label: label == "small")
    chosen = runner.Options(seconds=0.01, compile=False, **options)
    return [r for records in runner.run(planned, CPU, chosen, lambda what: None) for r in records]


def test_a_right_kernel_is_timed_in_both_modes(everywhere):
    records = _rows(toy.spec())
    ours = [r for r in records if r["contender"] == "kdkernels[cpu]"]
    assert [r["mode"] for r in ours] == ["forward", "forward+backward"]
    for r in ours:
        assert r["status"] == "ok"
        assert r["ms"] > 0
        assert r["rounds"] >= 5
        assert set(r["speedup_over"]) == {"eager", "floor"}
        assert r["error_over_bar"] <= 1
    assert ours[1]["extra_bytes"] < ours[1]["peak_bytes"]


@pytest.mark.parametrize("function", [toy.wrong, toy.raising])
def test_a_wrong_kernel_is_shown_as_failed_and_never_timed(everywhere, function):
    records = _rows(toy.spec(function))
    ours = [r for r in records if r["contender"] == "kdkernels[cpu]"]
    assert ours
    for r in ours:
        assert r["status"] == "failed"
        assert r["note"]
        assert r["ms"] is None
        assert r["speedup_over"] == {}
    assert all(r["status"] == "ok" for r in records if r["contender"] == "eager")


def test_another_librarys_other_loss_is_refused(everywhere, monkeypatch):
    def load(factor):
        return lambda: lambda x, scale: factor * toy.eager(x, scale)

    listed = [peers.Peer(name, ("toy",), ("cpu",), load(f)) for name, f in (("torch", 1.0), ("pytest", 2.0))]
    monkeypatch.setattr(peers, "PEERS", [*listed, peers.Peer("no-such-package", ("toy",), ("cpu",), load(1.0))])
    status = {r["contender"]: (r["status"], r["note"]) for r in _rows(toy.spec())}
    assert status["torch"][0] == "ok"
    assert status["pytest"][0] == "failed"
    assert status["pytest"][1].startswith("another loss")
    assert status["no-such-package"] == ("absent", "not installed")


def test_every_peers_case_is_in_the_registry():
    known = {case.name for _, case in select.cases()}
    assert {name for peer in peers.PEERS for name in peer.cases} <= known


def test_check_sees_a_wrong_kernel_on_its_backend_only(everywhere):
    spec = toy.spec(toy.wrong)
    found = list(accuracy.check(spec, spec.cases[0], (3, 5), (torch.float32, torch.bfloat16), spec.backends, CPU))
    assert {r.backend for r in found if not r.passed} == {"cpu"}
    assert {(r.dtype, r.output) for r in found} == {(d, o) for d in ("float32", "bfloat16") for o in ("loss", "d x")}
    json.dumps([r.record() for r in found], allow_nan=False)


def test_big_shapes_are_checked_on_fewer_rows():
    assert gate.cut((8192, 128256), 2**26) == (523, 128256)
    assert gate.cut((64, 100), 2**26) == (64, 100)
    assert gate.cut((8, 10**9), 2**26) == (1, 10**9)


def _content(tmp_path, **about):
    described = {**environment.describe(CPU), "slug": "some-cpu", "date": "2026-01-02", **about}
    rows = _rows(toy.spec())
    return {"schema": 1, "environment": described, "families": ["toy_family"], "ceilings": {"add GB/s": 12.5},
            "startup": {"import": 0.25}, "rows": rows}  # fmt: skip


def test_result_files(everywhere, tmp_path):
    content = _content(tmp_path)
    written = results.write(tmp_path, content, ("json", "csv", "md"))
    assert [p.name for p in written] == [f"2026-01-02-toy_family.{s}" for s in ("json", "csv", "md")]
    read = json.loads(written[0].read_text())
    assert read == json.loads(json.dumps(content))
    assert {"device", "date", "torch", "commit", "threads", "cores", "kdkernels"} <= set(read["environment"])
    keys = {"family", "case", "shape", "dtype", "mode", "contender", "status", "ms", "speedup_over", "extra_bytes"}
    assert all(keys <= set(r) for r in read["rows"])
    table = list(csv.DictReader(written[1].open()))
    assert len(table) == len(content["rows"])
    assert float(table[0]["ms"]) > 0
    assert "kdkernels[cpu]" in written[2].read_text()


def test_plot(everywhere, tmp_path):
    pytest.importorskip("matplotlib")
    (path,) = results.write(tmp_path, _content(tmp_path), ("png",))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_scaling_goes_on_until_a_contender_would_fail(everywhere, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    spec = toy.spec()
    chosen = [(spec, spec.cases[0])]
    records = list(scaling.run(chosen, CPU, None, 300, lambda what: None))
    assert [r["n"] for r in records] == [64, 128, 256] * 2
    assert {r["contender"] for r in records} == {"kdkernels[cpu]", "eager"}
    assert all(r["ms"] > 0 and r["peak_bytes"] > 0 for r in records)
    # Memory grows with N here: the third size would need twice the second's.
    monkeypatch.setattr(scaling, "free_bytes", lambda device: 2.5 * records[1]["peak_bytes"])
    stopped = list(scaling.run(chosen, CPU, None, 300, lambda what: None))
    assert [r["status"] for r in stopped] == ["ok", "ok", "stopped"] * 2
    assert "GiB" in stopped[2]["note"]
    monkeypatch.setattr(scaling, "SECONDS", 0.0)
    assert [r["status"] for r in scaling.run(chosen, CPU, None, 300, lambda what: None)] == ["ok", "stopped"] * 2
    described = {**environment.describe(CPU), "date": "2026-01-02"}
    written = scaling.write(tmp_path, described, stopped)
    assert [p.name for p in written] == ["2026-01-02-scaling.json", "2026-01-02-scaling.png"]
    assert json.loads(written[0].read_text())["scaling"] == stopped
    assert written[1].read_bytes().startswith(b"\x89PNG")


def test_readme_is_written_from_the_newest_files_and_checked(everywhere, tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "specs", lambda: (toy.spec(),))
    for date in ("2026-01-02", "2026-03-04"):
        results.write(tmp_path / "results" / "some-cpu", _content(tmp_path, date=date), ("json",))
    page = tmp_path / "README.md"
    page.write_text(
        "a\n<!-- losses:begin -->\nold\n<!-- losses:end -->\nb\n<!-- bench:begin -->\n<!-- bench:end -->\nc\n"
    )
    arguments = ["--file", str(page), "--results", str(tmp_path / "results")]
    assert readme.main([*arguments, "--check"]) == 1
    assert readme.main(arguments) == 0
    assert readme.main([*arguments, "--check"]) == 0
    text = page.read_text()
    assert "old" not in text
    assert "2026-03-04" in text
    assert "2026-01-02" not in text
    assert "| `toy` | 64 x 50 | float32 | cpu |" in text
    assert "over eager" in text and "over torch.compile" not in text, "a column that no row has is left out"
    page.write_text("no markers")
    assert readme.main(arguments) == 2


def test_the_table_names_every_commit_that_was_measured():
    def file(commit):
        about = {**environment.describe(CPU), "device": "Some CPU", "date": "2026-01-02", "commit": commit}
        return {"environment": about}

    said = readme.measured_on([file("b"), file("a"), file("b")])
    assert said.startswith("Some CPU, 2026-01-02, torch") and said.endswith("commit a, b")


def test_a_wrong_result_outweighs_an_older_right_one():
    def file(date, passed):
        found = [{"case": "toy", "backend": "cpu", "passed": passed}]
        return {"environment": {"date": date, "device": "Some CPU, 2 cores"}, "results": found}

    assert readme.verified([file("2026-01-02", True)]) == {("toy", "cpu"): "Some CPU, 2026-01-02"}
    assert "wrong" in readme.verified([file("2026-01-02", True), file("2026-01-03", False)])["toy", "cpu"]


def test_a_run_of_some_rows_does_not_replace_a_file_of_more(tmp_path: Path) -> None:
    both = [("toy", (2, 3), "float32"), ("toy", (4, 5), "float32")]
    rows = [{"case": c, "shape": list(shape), "dtype": dtype} for c, shape, dtype in both]
    (tmp_path / "2026-01-02-toy.json").write_text(json.dumps({"rows": rows}))
    assert results.would_lose(tmp_path, "2026-01-02", {"toy": set(both)}) is None
    assert results.would_lose(tmp_path, "2026-01-03", {"toy": set(both[:1])}) is None
    lost = results.would_lose(tmp_path, "2026-01-02", {"other": set(), "toy": {*both[:1], ("more", (1,), "float32")}})
    assert "2026-01-02-toy.json holds 1 rows" in lost
    date = environment.describe(torch.device("cpu"))["date"]
    (tmp_path / f"{date}-row_divergence.json").write_text(json.dumps({"rows": rows}))
    command = ["bench", "--device", "cpu", "--case", "kl_div", "--shape", "tiny", "--output-exactly", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "kdkernels", *command], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "holds 2 rows that this run does not time" in done.stderr


def test_every_case_that_is_timed_has_a_floor_and_a_gradient():
    for _, case in select.cases():
        if case.bench or case.bench_gpu:
            assert case.floor_bytes is not None or case.floor_work is not None, case.name
            assert set(case.bench_grads) <= set(case.grads), case.name
            assert case.eager is not None, case.name


def _script(*arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "bench" / "on_gpu.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120)


@pytest.mark.skipif(sys.platform == "win32", reason="a bash script")
def test_gpu_script_dry_run_names_every_stage_and_runs_what_needs_no_gpu():
    done = _script("--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("build", "smoke", "tests", "sanitizer", "ceilings", "check", "bench"):
        assert f"=== {stage}: ok" in done.stdout
    for tool in ("memcheck", "racecheck", "synccheck"):
        assert f"compute-sanitizer --tool {tool}" in done.stdout
    assert "kl_div llm-32k (8192, 32000) bfloat16" in done.stdout
    assert _script("--dry-run", "nonsense").returncode == 2


@pytest.mark.parametrize("case", [c for s in specs() for c in s.cases if c.eager], ids=lambda c: c.name)
def test_eager_baselines_run_and_return_what_the_loss_does(case: Case) -> None:
    shape = min(case.shapes, key=lambda s: torch.Size(s).numel())
    inputs = case.make(shape, torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = case.function(**inputs, **case.options), case.eager(**inputs, **case.options)
    assert theirs.shape == ours.shape


def test_one_right_shape_or_file_does_not_excuse_a_wrong_one():
    def file(*right: bool) -> dict:
        return {
            "environment": {"device": "Some CPU, 2 cores", "date": "2026-01-02"},
            "results": [{"case": "toy", "backend": "cpu", "passed": r} for r in right],
        }

    wrong = "**wrong** on Some CPU, 2026-01-02"
    assert readme.verified([file(False, True)]) == {("toy", "cpu"): wrong}
    assert readme.verified([file(True, False), file(True)]) == {("toy", "cpu"): wrong}
    assert readme.verified([file(True, True)]) == {("toy", "cpu"): "Some CPU, 2026-01-02"}
