"""The commands: exit codes, what they say when something is missing, and that they work without extras."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types

import pytest
import toy

import kdkernels
from kdkernels import backends, console
from kdkernels.bench import select
from kdkernels.cli import info, main


def test_info_says_what_runs_and_why_the_rest_does_not(capsys):
    assert main(["info", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["kdkernels"] == kdkernels.__version__
    table = {(b["backend"], b["tensors"]): b for b in said["backends"]}
    assert set(table) == {(b, d) for b in backends.BACKENDS for d in ("cpu", "cuda")} - {
        ("cpu", "cuda"),
        ("cuda", "cpu"),
    }
    assert table["reference", "cpu"]["available"]
    assert all(b["available"] or b["reason"] for b in said["backends"])
    assert said["auto"]["cpu"] in ("cpu", "reference")
    # scikit-learn, which other tests load, carries a thread pool of its own.
    assert said["second_thread_pool"] is not True or "sklearn" in sys.modules


def test_info_in_plain_text_without_rich(capsys, monkeypatch):
    monkeypatch.setattr(console, "rich", None)
    monkeypatch.setenv("KDKERNELS_BACKEND", "reference")
    monkeypatch.setattr(backends, "environment", "reference")
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert kdkernels.__version__ in said
    assert "KDKERNELS_BACKEND=reference" in said
    assert "asked for    reference" in said


def test_a_second_thread_pool_is_seen(tmp_path):
    maps = tmp_path / "maps"
    line = "7f0000000000-7f0000001000 r-xp 00000000 08:01 42    {}\n"
    maps.write_text(line.format("/a/torch/lib/libgomp.so.1") * 2 + line.format("/usr/lib/libc.so.6"))
    assert info.openmp_libraries(maps) == ["/a/torch/lib/libgomp.so.1"]
    maps.write_text(line.format("/a/torch/lib/libgomp-24e2ab19.so.1") + line.format("/opt/lib/libiomp5.so"))
    assert len(info.openmp_libraries(maps)) == 2
    assert info.openmp_libraries(tmp_path / "nothing") is None


@pytest.mark.parametrize(("function", "code"), [(toy.right, 0), (toy.wrong, 1), (toy.raising, 1)])
def test_check_fails_where_a_kernel_is_wrong(monkeypatch, capsys, tmp_path, function, code):
    spec = toy.spec(function)
    monkeypatch.setattr(backends, "unavailable", lambda backend, device: None)
    monkeypatch.setattr(select, "cases", lambda family, pattern: [(spec, spec.cases[0])])
    path = tmp_path / "out.json"
    assert main(["check", "--device", "cpu", "--json", str(path)]) == code
    said = capsys.readouterr().out
    assert ("FAILED toy" in said) == bool(code)
    written = json.loads(path.read_text())
    assert (written["failed"] > 0) == bool(code)
    assert all(r["passed"] for r in written["results"] if r["backend"] == "reference")


def test_check_on_the_real_registry():
    assert main(["check", "--device", "cpu", "--backend", "reference", "--case", "kl_div", "--small"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--family", "nonsense"], "unknown family 'nonsense'"),
        (["check", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["check", "--device", "nonsense"], "device 'nonsense' cannot be used"),
        (["check", "--device", "cpu", "--backend", "cuda"], "these are on 'cpu'"),
        (["check", "--case", "nonsense"], "no case matches"),
        (["bench", "--case", "nonsense"], "no case matches"),
        (["bench", "--format", "docx"], "unknown format 'docx'"),
        (["bench", "--device", "cpu", "--backend", "nonsense"], "there is no backend of that name"),
        (["bench", "--device", "cpu", "--backend", "cuda"], "these are on 'cpu'"),
        (["bench", "--scaling", "--device", "cpu", "--backend", "reference"], "'reference' is not timed"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(capsys, arguments, message):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_missing_extra_is_named(monkeypatch, capsys):
    def run(args):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.pyplot")

    module = types.SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr("kdkernels.cli._command", lambda name: module)
    assert main(["bench"]) == 2
    assert "pip install 'kdkernels[bench]'" in capsys.readouterr().err
    assert main(["demo"]) == 2
    assert "pip install 'kdkernels[demo]'" in capsys.readouterr().err
    monkeypatch.setattr(module, "run", lambda args: (_ for _ in ()).throw(ModuleNotFoundError("x", name="kdkernels.x")))
    with pytest.raises(ModuleNotFoundError):
        main(["bench"])


def test_rows_for_a_gpu_can_be_listed_without_one(capsys):
    assert main(["bench", "--list", "--device", "cuda", "--dtype", "bfloat16", "--shape", "llm-*"]) == 0
    assert "kl_div llm-128k (8192, 128256) bfloat16" in capsys.readouterr().out.splitlines()


def test_output_that_nobody_reads_is_no_error():
    """As where `head` has gone: the pipe's other end is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "kdkernels", "bench", "--list"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=100)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_help_and_version_do_not_import_the_commands():
    program = (
        "import sys; from kdkernels.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'sklearn', 'matplotlib', 'kdkernels.demo', 'kdkernels.cli.bench'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("demo", "bench", "check", "info"))
    done = subprocess.run([sys.executable, "-m", "kdkernels", "--version"], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == f"kdkernels {kdkernels.__version__}"


def test_tables():
    assert console.without_empty(["a", "b", "c"], [["1", "", ""], ["", "", "2"]]) == (
        ["a", "c"],
        [["1", ""], ["", "2"]],
    )
    assert console.plain_table(["a", "bb"], [["1", "2"], ["333", ""]]) == "a    bb\n---  --\n1    2\n333"
    assert console.markdown_table(["a"], [["x|y"]]) == "| a |\n| --- |\n| x\\|y |\n"
