"""The documentation: its code runs, every public function has a page, and every figure comes from a result file."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import kdkernels
from kdkernels import cli

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# What a snippet's "before" may import, and how to get it; without it there is nothing to compare with.
PEERS = {
    "torchdistill": "pip install torchdistill torchvision",
    "distiller_zoo": "put a checkout of RepDistiller on PYTHONPATH",
    "mdistiller": "put a checkout of mdistiller on PYTHONPATH",
    "liger_kernel": "pip install liger-kernel",
    "trl": "pip install trl",
    "torchtune": "pip install torchtune 'torchao<0.12'",
    "modelopt": "pip install nvidia-modelopt",
}
sys.path.insert(0, str(DOCS / "generate"))
sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
import figures  # noqa: E402
import formulas  # noqa: E402
import reference  # noqa: E402

sys.dont_write_bytecode = before


def blocks(page: Path) -> list[str]:
    """The page's python code, block by block."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def names() -> dict[str, Any]:
    """What snippets take as given; docs/migrate/index.md says so to readers."""
    g = torch.Generator().manual_seed(0)

    def leaf(*shape: int, learns: bool) -> torch.Tensor:
        return torch.randn(shape, generator=g).requires_grad_(learns)

    student, teacher = torch.nn.Linear(4, 10), torch.nn.Linear(4, 10)
    return {
        "torch": torch, "F": F, "kdkernels": kdkernels, "T": 4.0, "alpha": 0.9,
        "s": leaf(8, 10, learns=True), "t": leaf(8, 10, learns=False),
        "y": torch.tensor([0, 3, 9, 3, 1, 2, 4, 8]), "x": leaf(8, 4, learns=False), "student": student, "teacher": teacher,
        "maps_s": [leaf(3, 6, 5, 5, learns=True)], "maps_t": [leaf(3, 6, 5, 5, learns=False)],
        "e_s": leaf(8, 6, learns=True), "e_t": leaf(8, 6, learns=False),
        "h_s": leaf(8, 5, learns=True), "w_s": leaf(10, 5, learns=True), "h_t": leaf(8, 5, learns=False),
        "w_t": leaf(10, 5, learns=False),
    }  # fmt: skip


def result(code: str, where: str) -> list[torch.Tensor]:
    """The snippet's loss, and its gradients by everything that learns."""
    space = names()
    exec(compile(code, where, "exec"), space)
    leaves = [v for value in space.values() for v in (value if isinstance(value, list) else [value])]
    leaves = [v for v in leaves if isinstance(v, torch.Tensor) and v.is_leaf and v.requires_grad]
    loss = torch.as_tensor(space["loss"]).sum()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(v) if g is None else g for v, g in zip(leaves, gradients, strict=True))]


def before_and_after() -> Iterator[Any]:
    for page in PAGES:
        for i, code in enumerate(blocks(page)):
            if code.startswith("# before\n"):
                old, _, new = code.partition("# after")
                place = f"{page.relative_to(ROOT)}-{i}"
                yield pytest.param(old, new.partition("\n")[2], place, id=place)


@pytest.mark.parametrize("old, new, place", list(before_and_after()))
def test_a_changed_line_changes_no_value(old, new, place):
    ours = result(new, place)
    try:
        theirs = result(old, place)
    except ModuleNotFoundError as error:
        pytest.skip(f"{PEERS[str(error.name).partition('.')[0]]}, to compare with it ({error})")
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_code_runs(page):
    """Everything else, one block after the other as a reader would."""
    space = names()
    threads = torch.get_num_threads()
    try:
        for code in blocks(page):
            if not code.startswith("# before\n"):
                exec(compile(code, str(page.relative_to(ROOT)), "exec"), space)
    finally:
        torch.set_num_threads(threads)


def test_commands_are_those_of_the_command_line(capsys):
    """`kdkernels demo --scheme assistant`: every word of a page's commands is one that kdkernels knows."""
    found = {
        line for page in PAGES for line in re.findall(r"kdkernels (?:demo|bench|check|info)[^`\n&]*", page.read_text())
    }
    helps: dict[str, str] = {}
    for line in sorted(found):
        command, *words = line.split()[1:]
        command = re.sub(r"\W", "", command)
        if command not in helps:
            with pytest.raises(SystemExit):
                cli.main([command, "--help"])
            helps[command] = capsys.readouterr().out
        for word in words:
            if word.startswith("--"):
                assert re.sub(r"[^\w-]", "", word) in helps[command], f"{line}: kdkernels {command} has no {word}"


# ---- generated pages ----


def test_every_public_name_has_its_page():
    made = reference.pages()
    text = "\n".join(made.values())
    for name in kdkernels.__all__:
        if inspect.isfunction(getattr(kdkernels, name)) and f"losses/{name}.md" in made:
            assert f"kdkernels.{name}(" in made[f"losses/{name}.md"]
        else:
            module = reference.modules_by_name().get(name)
            assert f"`kdkernels.{name}(**options)`" in text if module else f"## {name}\n" in text, f"no page has {name}"
    assert len(reference.losses()) == sum(path.startswith("losses/") for path in made) - 1
    assert len(reference.families()) == sum(path.startswith("families/") for path in made)
    menu = str(reference.navigation())
    assert all(path in menu or path == "losses/index.md" for path in made)


def test_a_new_function_gets_a_page_by_itself(monkeypatch):
    def brand_new_loss(
        student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, margin: float = 0.5
    ) -> torch.Tensor:
        """A loss of tomorrow.

        With a_i the margins:

            L = sum_i a_i^2 / T_s

        Args:
            student_logits: scores (N, V), N < V.
            teacher_logits: the same.
            margin: at least 0.

        Raises:
            ValueError: margin below 0.
        """
        return student_logits

    brand_new_loss.__module__ = "kdkernels.losses.logits"
    module = type("BrandNewLoss", (), {})
    monkeypatch.setattr(kdkernels, "brand_new_loss", brand_new_loss, raising=False)
    monkeypatch.setattr(kdkernels, "__all__", [*kdkernels.__all__, "brand_new_loss"])
    known = reference.modules()
    monkeypatch.setattr(reference, "modules", lambda: {**known, brand_new_loss: module})
    made = reference.pages()
    page = made["losses/brand_new_loss.md"]
    for part in ("# brand_new_loss", "A loss of tomorrow.", "margin=0.5", "`margin` = `0.5`\n:   at least 0.", "BrandNewLoss",
                 "`ValueError`\n:   margin below 0.", "N &lt; V", "<math", "Not measured yet"):  # fmt: skip
        assert part in page, part
    assert "brand_new_loss.md" in made["losses/index.md"]
    assert "losses/brand_new_loss.md" in str(reference.navigation())


def test_docstrings_lose_nothing():
    """Every word of a docstring's arguments is on its page."""
    for function in reference.losses():
        page = re.sub(r"\s+", " ", reference.loss_page(function))
        for title, text in reference.sections(inspect.getdoc(function) or ""):
            if title in ("Args", "Raises"):
                described = reference.entries(text)
                assert all(name for name, _ in described), f"{function.__name__}: {described}"
                described = [(n, re.sub(r"kdkernels/\S+/README\.md", "", text)) for n, text in described]  # are links
                words = [w for _, description in described for w in re.findall(r"\w{4,}", description)]
                assert not [w for w in words if w not in page]
        documented = {n for title, text in reference.sections(inspect.getdoc(function) or "") if title == "Args"
                      for names, _ in reference.entries(text) for n in names.split(", ")}  # fmt: skip
        missing = set(inspect.signature(function).parameters) - documented
        # What is not explained here is another loss's, to whose page a link leads.
        assert not missing or "](../losses/" in page, f"{function.__name__} does not explain {missing}"


# ---- formulas ----


def test_formulas():
    assert "<msub><mi>p</mi><mrow><mi>s</mi></mrow></msub>" in formulas.mathml("    p_s")
    assert "<msubsup>" in formulas.mathml("    p_s^(alpha + 1)")
    assert "<munder><mo>∑</mo><mrow><mi>j</mi><mo>≠</mo><mi>i</mi></mrow></munder>" in formulas.mathml(
        "    sum_{j != i} x"
    )
    assert "<msup><mi>e</mi><mrow><mo>−</mo>" in formulas.mathml("    e^-d_ij")
    assert "<mo>×</mo>" in formulas.mathml("    N x V") and "<mi>x</mi>" in formulas.mathml("    a x b")
    assert "&lt;" in formulas.mathml("    a < b")
    text = formulas.with_formulas("Text:\n- an item\n  more\n\n    loss = f(x)\n")
    assert "Text:\n\n- an item" in text
    assert "```python\nloss = f(x)\n```" in formulas.with_formulas("So:\n\n    loss = f(x)\n")


def test_formulas_of_all_families_are_well_formed():
    import xml.etree.ElementTree as ET

    for path, text in reference.pages().items():
        for block in re.findall(r"<math.*?</math>", text, re.DOTALL):
            try:
                ET.fromstring(block.replace("&#160;", " ").replace("&#x2061;", ""))
            except ET.ParseError as error:
                pytest.fail(f"{path}: {error}")
        assert "    L = " not in text, f"{path} has a formula that was left as code"


# ---- figures ----


def test_pages_have_no_figure_of_their_own():
    """Times and factors come from result files by {{ ... }}; nobody types them."""
    for page in DOCS.rglob("*.md"):
        typed = re.sub(r"\{\{.*?\}\}", "", page.read_text())
        assert not re.search(r"\b\d[\d.]* ?(?:us|ms|µs|GB/s|GiB|KiB)\b|\d×", typed), page.name
        figures.filled(page.read_text())


def test_figures_follow_the_result_files(monkeypatch):
    row = {"case": "kl_div", "label": "x", "shape": [2, 3], "dtype": "float32", "mode": "forward+backward", "status": "ok",
           "headline": True}  # fmt: skip
    rows = [
        {**row, "contender": "kdkernels[cpu]", "ms": 0.5, "extra_bytes": 8, "speedup_over": {"eager": [2.0, 3.0, 4.0]}},
        {**row, "contender": "eager", "ms": 1.5, "extra_bytes": 2048, "speedup_over": {}},
    ]
    about = {"slug": "abacus", "device": "an abacus", "date": "1999-01-01", "system": "wood", "torch": "none", "threads": 1,
             "device_type": "cpu"}  # fmt: skip
    content = {"environment": about, "families": ["row_divergence"], "rows": rows}
    monkeypatch.setattr(figures, "newest", lambda: {("abacus", "row_divergence"): content})
    assert figures.cost("kl_div", "2x3") == "500 us, eager 3.0× as long; 8 B extra memory, eager 2 KiB"
    assert figures.cost("kl_div", "9x9") == figures.NOT_YET
    assert "an abacus" in figures.cost_table(kdkernels.kl_div) and "1999-01-01" in figures.environments()
    assert "3.0×" in figures.plots("speed") and "2 × 3" in figures.family_tables()
    assert "No GPU" in figures.environments()
    with pytest.raises(ValueError, match="no spec.py has that case"):
        figures.filled("{{ cost kl_divv 2x3 }}")
    with pytest.raises(ValueError, match="asks for 'price'"):
        figures.filled("{{ price kl_div }}")
