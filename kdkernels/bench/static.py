"""What the compilers say about the kernels, with no GPU: registers, spills, shared memory, width of the accesses.

    python -m kdkernels.bench.static [--json FILE] [--targets cuda:80 cuda:90 hip:gfx942] [--families NAME ...]

Triton kernels are those that a family's triton.py lists in `aot_signatures()`; the CUDA C++ kernels are read out of
the built extension. Exits with 1 where a kernel does not compile or spills more than MAX_SPILL bytes a thread.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from kdkernels.console import print_table

TARGETS = ("cuda:80", "cuda:90", "hip:gfx942")
MAX_SPILL = 32  # bytes a thread: a few scalars set aside, never a tile


def _families() -> list[str]:
    ops = Path(__file__).parents[1] / "ops"
    return sorted(p.parent.name for p in ops.glob("*/triton.py") if "aot_signatures" in p.read_text())


def _tool(name: str) -> str | None:
    """cuobjdump, which triton's wheel carries."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if path.exists() else None


def _cubin_usage(path: str) -> dict[str, dict[str, int]]:
    """Kernel -> registers, stack (spills and local arrays) and shared memory of every architecture in a file."""
    tool = _tool("cuobjdump")
    if tool is None:
        return {}
    text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True).stdout
    found, arch, name = {}, "", ""
    for line in text.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            use = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            found[f"{arch} {name}"] = {
                "registers": use["REG"], "spill": use["STACK"] + use["LOCAL"], "shared": use["SHARED"]
            }  # fmt: skip
    return found


def _widest(text: str, pattern: str, bits: Any) -> int:
    """Widest access in bytes of those that `pattern` finds."""
    return max((bits(m) for m in re.finditer(pattern, text)), default=0) // 8


def _ptx_bits(match: re.Match) -> int:
    return int((match[1] or "v1")[1:]) * int(match[2])


def _gcn_bits(match: re.Match) -> int:
    return {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}.get(match[1], 16)


def _nvidia(compiled: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = next(iter(_cubin_usage(file.name).values()), {"registers": 0, "spill": 0})
    access = r"{}\.global[\w.:]*?(?:\.(v\d))?\.[bfus](\d+)"
    return {
        "registers": usage["registers"],
        "spill": usage["spill"],
        "shared": compiled.metadata.shared,
        "load": _widest(compiled.asm["ptx"], access.format("ld"), _ptx_bits),
        "store": _widest(compiled.asm["ptx"], access.format("st"), _ptx_bits),
    }


def _amd(compiled: Any) -> dict[str, int]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        match = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(match[1]) if match else 0

    access = r"(?:global|buffer)_{}_(dwordx[234]|dword|\w+)"
    return {
        "registers": number("vgpr_count"),
        "spill": 4 * (number("vgpr_spill_count") + number("sgpr_spill_count")),
        "shared": compiled.metadata.shared,
        "load": _widest(text, access.format("load"), _gcn_bits),
        "store": _widest(text, access.format("store"), _gcn_bits),
    }


def _compile(targets: list[str], families: list[str]) -> list[dict[str, Any]]:
    """One row for each signature and target. Runs where triton is not interpreting."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    rows = []
    for family in families:
        module = importlib.import_module(f"kdkernels.ops.{family}.triton")
        for case in module.aot_signatures():
            kernel = case["kernel"]
            attrs = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in case["divisible"]}
            for target in targets:
                backend, arch = target.split(":")
                where = GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)
                row = {"family": family, "name": case["name"], "target": target, "warps": case["num_warps"]}
                try:
                    compiled = triton.compile(
                        ASTSource(kernel, case["signature"], case["constexprs"], attrs),
                        target=where,
                        options={"num_warps": case["num_warps"], "num_stages": case["num_stages"]},
                    )
                    row |= _nvidia(compiled) if backend == "cuda" else _amd(compiled)
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {error}"[:2000]
                rows.append(row)
    return rows


def _plain_name(name: str) -> str:
    """A kernel's name and template arguments, where c++filt is there to tell."""
    if shutil.which("c++filt"):
        name = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    return re.sub(r"\(anonymous namespace\)::|\bkdk::cuda::|^void |\(.*", "", name)


def _extension() -> list[dict[str, Any]]:
    """The CUDA C++ kernels of the built extension, if it has any."""
    rows = []
    for path in Path(__file__).parents[1].glob("_C*.so"):
        for key, usage in _cubin_usage(str(path)).items():
            arch, name = key.split(" ", 1)
            name = _plain_name(name)
            rows.append({"family": "CUDA C++", "name": name, "target": arch.replace("sm_", "cuda:"), **usage})
    return rows


def collect(targets: list[str], families: list[str]) -> list[dict[str, Any]]:
    """All rows; the Triton ones from a process of its own, where the interpreter is off."""
    rows: list[dict[str, Any]] = []
    if importlib.util.find_spec("triton") is not None and families:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            command = [sys.executable, "-m", "kdkernels.bench.static", "--worker", str(out)]
            done = subprocess.run([*command, "--targets", *targets, "--families", *families], env=env)
            if done.returncode:
                rows = [
                    {"family": f, "name": "", "target": "", "error": "the compiling process failed"} for f in families
                ]
            else:
                rows = json.loads(out.read_text())
    return rows + _extension()


def failed(row: dict[str, Any]) -> bool:
    return "error" in row or row.get("spill", 0) > MAX_SPILL


def _show(rows: list[dict[str, Any]]) -> None:
    columns = ("target", "name", "warps", "registers", "spill", "shared", "load", "store")
    cells = [[str(row.get(c, "")) for c in columns] for row in rows]
    for line, row in zip(cells, rows):
        line[1] = f"{row['family']}: {line[1]}"
    title = "Kernels as compiled (bytes; spill a thread; widest global load and store)"
    print_table(title, columns, cells, [failed(row) for row in rows])
    for row in rows:
        if "error" in row:
            print(f"{row['target']} {row['family']}: {row['name']}: {row['error']}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("kdkernels bench --static", description="Compile the kernels without a GPU.")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), help=f"default: {' '.join(TARGETS)}")
    parser.add_argument("--families", nargs="*", default=None, help="default: all that have Triton kernels")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    families = _families() if args.families is None else args.families
    if args.worker:
        args.worker.write_text(json.dumps(_compile(args.targets, families)))
        return 0
    rows = collect(args.targets, families)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    _show(rows)
    return int(any(failed(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
