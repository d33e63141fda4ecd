"""Nothing waits for the device: read from the source, traced on fake GPU tensors, and run on a real GPU."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from targets import GPU
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kdkernels
from kdkernels import backends, distillation_loss, kl_div
from kdkernels.ops.registry import Case, Spec, specs
from kdkernels.ops.row_divergence.op import RowDivergence
from kdkernels.ops.scale.op import StoredGradients

ROOT = Path(kdkernels.__file__).parent
# Where plain PyTorch may look at values, and what only ever runs on a user's command.
EXEMPT_FILES = ("reference.py", "spec.py", "checks.py")
METHODS = {"item", "cpu", "tolist", "numpy", "nonzero", "masked_select", "unique", "synchronize", "is_nonzero"}
FUNCTIONS = {"equal", "allclose", "nonzero", "unique", "masked_select", "argwhere"}
# (files below kdkernels, what is called, a piece of the line or of its neighbours): why it sees no GPU tensor.
ALLOWED = {
    ("ops/scale/op.py", "is_one", "factor.is_cpu"): "guarded: only a CPU tensor",
    ("native.py", "item", "CPU tensor"): "it says so, and its calls are found too",
    ("ops/scalars.py", "float", "values"): "numbers, or tensors that are known to be on the CPU",
    ("ops/scalars.py", "float", "float(v), device=device"): "a number, or a tensor on the CPU: the condition follows",
    ("ops/*/triton*.py", "tolist", "scalars.tolist()"): "packed numbers, read where they are on the CPU",
    ("ops/*/triton.py", "float", "float(scalars[0])"): "the same, of one number",
    ("ops/triplet_angle/stages.py", "tolist", "scalars.tolist()"): "numbers: weights that are tensors never come here",
    ("ops/linear_divergence/*.py", "nonzero", "kept = "): "compact=True asks for it",
    ("losses/*.py", "int", "aminmax()"): "a check behind readable()",
    ("schemes/early_exit.py", "int", "sure.sum()"): "who goes on decides the next batch's size, as its docstring says",
}


def sources() -> Iterator[Path]:
    for folder in ("ops", "losses", "schemes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name not in EXEMPT_FILES:
                yield path
    yield ROOT / "native.py"


def plain_names(tree: ast.AST) -> set[str]:
    """Arguments that the file annotates as numbers or flags."""
    arguments = (
        a for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for a in (*f.args.args, *f.args.kwonlyargs)
    )
    return {a.arg for a in arguments if a.annotation and ast.unparse(a.annotation) in ("int", "float", "bool", "str")}


def tensor_like(node: ast.expr, plain: set[str]) -> bool:
    """Whether the argument of float(), int(), bool() or is_one() may be a tensor: not a literal, a size or a flag."""
    text = ast.unparse(node)
    if isinstance(node, ast.Constant) or text in {*plain, "kind", "inputs", "hard", "self._entries"}:
        return False
    return not any(
        word in text for word in ("shape", "size(", "numel", "dim()", "len(", "environ", ".type ==", "isinstance")
    )


def suspicious(tree: ast.AST) -> Iterator[tuple[int, str]]:
    plain = plain_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            f = node.func
            if (isinstance(f, ast.Attribute) and f.attr in METHODS) or (
                isinstance(f, ast.Attribute) and f.attr in FUNCTIONS and ast.unparse(f.value) == "torch"
            ):
                yield node.lineno, f.attr
            elif (
                isinstance(f, ast.Attribute)
                and f.attr == "where"
                and ast.unparse(f.value) == "torch"
                and len(node.args) == 1
            ):
                yield node.lineno, "where"
            elif (
                isinstance(f, ast.Name)
                and f.id in ("float", "int", "bool", "is_one")
                and node.args
                and tensor_like(node.args[0], plain)
            ):
                yield node.lineno, f.id
        elif (isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Compare)) or (
            isinstance(node, ast.Subscript)
            and isinstance(node.slice, ast.UnaryOp)
            and isinstance(node.slice.op, ast.Invert)
        ):
            yield node.lineno, "boolean index"


@pytest.mark.parametrize("path", list(sources()), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_source_never_reads_a_tensor(path: Path) -> None:
    text = path.read_text()
    lines = text.splitlines()
    name = path.relative_to(ROOT).as_posix()
    # Inside a Triton kernel nothing is a torch tensor.
    tree = ast.parse(text)
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
            node.body = [ast.Pass()]
    found = [
        f"{name}:{line}: {what}: {lines[line - 1].strip()}"
        for line, what in suspicious(tree)
        if not any(
            fnmatch(name, f) and what == w and part in " ".join(lines[line - 2 : line + 1]) for f, w, part in ALLOWED
        )
    ]
    assert not found, "waits for the device, if that is a GPU tensor:\n" + "\n".join(found)


def test_the_scan_sees_what_it_looks_for() -> None:
    bad = "x.item()\nfloat(x)\ny[x > 0]\ntorch.equal(x, y)\nx.cpu()\ntorch.where(x)\nbool(x.any())\nx.nonzero()\nis_one(x)\n"
    assert sorted(line for line, _ in suspicious(ast.parse(bad))) == list(range(1, 10))
    assert not list(suspicious(ast.parse("float(1)\nint(x.shape[0])\nx[-1]\nx[-n]\ny[:, 1]\ntorch.where(a, b, c)\n")))


class Watch(TorchDispatchMode):
    """Fails on every operator that brings a value, or a tensor, from a GPU to the host, or a tensor there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.seen.append(name)
        on_gpu = any(isinstance(a, torch.Tensor) and a.device.type == "cuda" for a in tree_leaves((args, kwargs)))
        if on_gpu and any(
            word in name for word in ("_local_scalar_dense", "nonzero", "is_nonzero", "unique", "masked_select")
        ):
            raise AssertionError(f"{name} on a GPU tensor waits for it")
        out = func(*args, **(kwargs or {}))
        if on_gpu and name.startswith(("aten._to_copy", "aten.copy_")):
            outs = out if isinstance(out, tuple) else (out,)
            assert all(o.device.type == "cuda" for o in outs), f"{name} brings a GPU tensor to the host"
        elif name.startswith("aten._to_copy"):
            assert out.device.type != "cuda", f"{name} brings a tensor of the host to a GPU, and waits for it"
        return out


STEPS = {
    "kl_div": (kl_div, {"temperature": 2.0}),
    "rowmean with labels": (kl_div, {"labels": True}),
    "weights": (kl_div, {"weight": True}),
    "none": (kl_div, {"reduction": "none", "labels": True}),
    "distillation": (distillation_loss, {"labels": True, "label_smoothing": 0.1}),
    "class weights": (distillation_loss, {"labels": True, "class_weight": True}),
    "num_items": (distillation_loss, {"labels": True, "num_items": "tensor"}),
    "tensors": (distillation_loss, {"labels": True, "temperature": "tensor", "alpha": "tensor"}),
    "learnable": (kl_div, {"temperature": "learnable", "labels": True}),
}


def arguments(options: dict[str, Any], dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, Any]]:
    s, t = (torch.randn(4, 6, device="cuda").to(dtype) for _ in range(2))
    made = {
        "labels": lambda: torch.randint(0, 6, (4,), device="cuda"),
        "weight": lambda: torch.rand(4, device="cuda"),
        "class_weight": lambda: torch.rand(6, device="cuda"),
    }
    options = {k: made[k]() if k in made and v is True else v for k, v in options.items()}
    for k, v in options.items():
        if v == "tensor" if isinstance(v, str) else False:
            options[k] = torch.full((), 0.5, device="cuda")
        elif isinstance(v, str) and v == "learnable":
            options[k] = torch.full((), 2.0, device="cuda").requires_grad_()
    return [s.requires_grad_(), t.requires_grad_()], options


class Context:
    """What autograd gives to a Function. The real one wants a device guard, which a CPU build has not for fake GPUs."""

    def __init__(self, needs: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.saved_tensors = tensors


def forward_and_backward(function: type[torch.autograd.Function], *inputs: Any) -> torch.Tensor:
    ctx: Any = Context(tuple(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs))
    with torch.no_grad():
        loss = function.forward(ctx, *inputs)
        function.backward(ctx, torch.full_like(loss, 0.5))
        function.backward(ctx, torch.ones_like(loss))
    return loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_traced_on_fake_gpu_tensors(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward with tensors that have no values: any look at one is an error."""
    if GPU:
        pytest.skip("the next test runs it")
    with FakeTensorMode():
        try:
            torch.empty(1, device="cuda")
        except (RuntimeError, AssertionError) as error:
            pytest.skip(f"this torch makes no fake GPU tensors: {error}")
        for autograd in (RowDivergence, StoredGradients):
            monkeypatch.setattr(autograd, "apply", functools.partial(forward_and_backward, autograd))
        function, options = STEPS[name]
        scores, options = arguments(options, dtype)
        with Watch() as watch:
            try:
                function(*scores, backend="triton", **options)
            except RuntimeError as error:
                if "not linked with support for cuda" not in str(error):
                    raise
                pytest.skip("install a CUDA build of torch, which indexes fake GPU tensors without a GPU too")
    assert any("row_divergence_forward" in n for n in watch.seen)
    assert any("row_divergence_backward" in n or "scale_" in n for n in watch.seen)


# linear_*'s compact=True is one wait, as its docstring says.
CASES = [(spec, case) for spec in specs() for case in spec.cases if not case.options.get("compact")]
ON_GPUS = [(case, backend) for spec, case in CASES for backend in ("cuda", "triton") if backend in spec.backends]


@pytest.mark.skipif(torch.version.cuda is None, reason="install a CUDA build of torch, which needs no GPU for it")
@pytest.mark.parametrize("spec, case", CASES if torch.version.cuda else CASES[:1], ids=lambda x: getattr(x, "name", ""))
def test_every_loss_on_fake_gpu_tensors(spec: Spec, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """On its way to the kernels, which are not run, no loss waits, and none leaves a tensor on the CPU."""
    monkeypatch.setattr(backends, "_unavailable", lambda backend, device: None)
    given = case.make(case.shapes[len(case.shapes) // 2], torch.Generator().manual_seed(0))
    for backend in {"cuda", "triton"} & set(spec.backends):
        with FakeTensorMode(allow_non_fake_inputs=True):
            inputs = {n: torch.empty_like(x, device="cuda") for n, x in given.items()}
            for name in case.grads:
                inputs[name] = inputs[name].to(spec.dtypes[-1]).requires_grad_()
            with Watch():
                loss = case.function(**inputs, **case.options, backend=backend)
        assert loss.device.type == "cuda"


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case, backend", ON_GPUS if GPU else ON_GPUS[:1], ids=lambda x: getattr(x, "name", x))
def test_every_loss_on_a_gpu(case: Case, backend: str, dtype: torch.dtype) -> None:
    given = case.make(case.shapes[len(case.shapes) // 2], torch.Generator().manual_seed(0))
    inputs = {n: x.cuda().to(dtype).requires_grad_() if n in case.grads else x.cuda() for n, x in given.items()}
    wanted = [inputs[n] for n in case.grads]

    def step() -> None:
        loss = case.function(**inputs, **case.options, backend=backend)
        torch.autograd.grad(loss, wanted, torch.full_like(loss, 0.5), allow_unused=True)

    step()  # compiles, loads
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_on_a_gpu(name: str, dtype: torch.dtype, backend: str) -> None:
    function, options = STEPS[name]
    (s, t), options = arguments(options, dtype)
    function(s, t, backend=backend, **options).sum().backward()  # compiles, loads
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = function(s, t, backend=backend, **options)
        loss.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_cuda_graph_captures_it(backend: str) -> None:
    s, t = (torch.randn(64, 100, device="cuda") for _ in range(2))
    labels = torch.randint(0, 100, (64,), device="cuda")
    s.requires_grad_()

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        loss = distillation_loss(s, t, labels, 4.0, backend=backend)
        return loss, torch.autograd.grad(loss, s)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = run()
    with torch.no_grad():
        s.copy_(torch.randn_like(s))
    graph.replay()
    expected, expected_grad = run()
    assert torch.equal(loss, expected)
    assert torch.equal(grad, expected_grad)
