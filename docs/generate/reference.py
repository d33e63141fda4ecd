"""The pages that come from the package: one for each public function, kernel family and group of classes.

Nothing here lists a function. What `kdkernels.__all__` has gets a page, with its docstring, the mathematics of its kernel
family, where it was verified and what it costs by the committed result files.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import figures
from formulas import with_formulas

import kdkernels
import kdkernels.integrations
from kdkernels.losses.module import LossModule
from kdkernels.ops.registry import Spec, specs

ROOT = Path(__file__).resolve().parents[2]
OPS = ROOT / "kdkernels" / "ops"
HEADINGS = {"Args": "Arguments", "Attributes": "Attributes", "Returns": "Returns", "Raises": "Raises"}
Nav = list[dict[str, Any]]


# ---- what there is ----


def functions() -> list[Callable[..., Any]]:
    """Every public function, in the order of its module and then of the source."""
    found = [getattr(kdkernels, name) for name in kdkernels.__all__]
    found = [f for f in found if inspect.isfunction(f)]
    return sorted(found, key=lambda f: (f.__module__, f.__code__.co_firstlineno))


def modules() -> dict[Callable[..., Any], type[LossModule]]:
    """The module of each loss."""
    return {m.__dict__["function"].__func__: m for m in LossModule.__subclasses__()}


def modules_by_name() -> dict[str, type[LossModule]]:
    return {m.__name__: m for m in modules().values()}


def losses() -> list[Callable[..., Any]]:
    known = modules()
    return [f for f in functions() if f in known]


@functools.cache
def spec_of(function: Callable[..., Any]) -> Spec | None:
    return next((s for s in specs() if any(c.function is function for c in s.cases)), None)


def families() -> list[Path]:
    """The folder of every kernel family that has a README."""
    return sorted(p.parent for p in OPS.glob("*/README.md"))


def group(function: Callable[..., Any]) -> str:
    """The title of the group that a loss's module is: "Feature statistics", "IRG"."""
    stem = function.__module__.rpartition(".")[2]
    return stem.upper() if len(stem) <= 4 else stem.replace("_", " ").capitalize()


# ---- docstrings ----


def sections(doc: str) -> list[tuple[str, str]]:
    """A docstring's text and sections: ("", text) and ("Args", text without its indent), in their order."""
    found: list[tuple[str, list[str]]] = [("", [])]
    for line in doc.splitlines():
        if match := re.fullmatch(rf"({'|'.join(HEADINGS)}):", line):
            found.append((match[1], []))
        elif line.startswith("Against others: "):
            found.append(("Against others", [line.removeprefix("Against others: ")]))
        elif line and not line.startswith(" ") and found[-1][0] in HEADINGS:
            found.append(("", [line]))
        else:
            found[-1][1].append(line)
    return [(title, inspect.cleandoc("\n" + "\n".join(lines))) for title, lines in found]


def entries(text: str) -> list[tuple[str, str]]:
    """The (name, description) of an Args or Raises section."""
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        match = re.match(r"([\w*., ]+): (.*)", line)
        if match and not line.startswith(" "):
            found.append((match[1], [match[2]]))
        elif found:
            found[-1][1].append(line.strip())
        else:
            found.append(("", [line]))
    return [(name, " ".join(words)) for name, words in found]


def _escaped(text: str) -> str:
    """Text of a docstring as markdown: no tags, and links where it says "as kl_div" or "kl_div's"."""
    text = re.sub(r"(?<!`)<(?!`)", "&lt;", text)
    text = text.replace("kdkernels/distributed/README.md", "[over ranks](../distributed.md)")
    text = re.sub(r"kdkernels/ops/(\w+)/README\.md", r"[\1](../families/\1.md)", text)
    names = "|".join(f.__name__ for f in losses())
    return re.sub(rf"(?<![\w`./(])({names})(?![\w(`])", r"[`\1`](../losses/\1.md)", text)


def _defaults(function: Any) -> dict[str, str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: _shown(p.default) for p in parameters if p.default is not p.empty}


def _shown(default: Any) -> str:
    """A default as it is written here: with double quotes, and a function by its name."""
    if isinstance(default, str):
        return json.dumps(default)
    return getattr(default, "__name__", repr(default))


def docstring(obj: Any, level: int = 2) -> str:
    """A docstring as markdown, its sections under headings of this level."""
    defaults: dict[str, str] = {}
    with contextlib.suppress(TypeError, ValueError):
        defaults = _defaults(obj)
    out = []
    for title, text in sections(inspect.getdoc(obj) or ""):
        if title in HEADINGS:
            out.append(f"{'#' * level} {HEADINGS[title]}\n")
        if title == "Against others":
            out.append(f"{'#' * level} Against other libraries\n")
        if title in ("Args", "Attributes", "Raises"):
            for names, description in entries(text):
                shown = ", ".join(f"`{n}`" for n in names.split(", ")) if names else ""
                default = defaults.get(names)
                shown += f" = `{default}`" if default is not None and title == "Args" else ""
                out.append(f"{shown}\n:   {_escaped(description)}\n" if shown else f"{_escaped(description)}\n")
        else:
            body = text[:1].upper() + text[1:] if title == "Against others" else text
            out.append(with_formulas(_escaped(body)))
    return "\n".join(out)


def signature(obj: Any, name: str) -> str:
    """How to call it, an argument a line where one line is too short."""
    parts, star = [], False
    for p in inspect.signature(obj).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not star:
            parts.append("*")
        star = star or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        prefix = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        parts.append(f"{prefix}{p.name}" + ("" if p.default is p.empty else f"={_shown(p.default)}"))
    line = f"{name}({', '.join(parts)})"
    return line if len(line) <= 88 else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + ")"


# ---- pages ----


def readme_definition(family: Path) -> str:
    """What a family's README says before its second section: what it is, and the definition."""
    text = (family / "README.md").read_text()
    parts = re.split(r"^## ", text, flags=re.MULTILINE)
    chosen = next((p for p in parts[1:] if p.startswith("Definition")), parts[1] if len(parts) > 1 else "")
    intro = parts[0].partition("\n")[2].strip()
    return f"{intro}\n\n### {chosen.strip()}\n" if chosen else f"{intro}\n"


def _family_text(text: str) -> str:
    """A family's README for the site: links to other families' are links to their pages."""
    text = re.sub(r"\]\(\.\./(\w+)/README\.md", r"](\1.md", text)
    return with_formulas(re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL))


def loss_page(function: Callable[..., Any]) -> str:
    name, module, spec = function.__name__, modules()[function], spec_of(function)
    summary = (inspect.getdoc(function) or "").partition("\n")[0]
    out = [f"# {name}\n", f"{_escaped(summary)}\n", f"```python\n{signature(function, f'kdkernels.{name}')}\n```\n"]
    body = docstring(function)
    out.append(body.partition("\n")[2] if body.startswith(_escaped(summary)) else body)
    out.append(
        f"## As a module\n\n`kdkernels.{module.__name__}(**options)` keeps options, given by name, and is called with "
        "the tensors. A parameter among them (a learnable temperature) becomes the module's, a tensor its buffer.\n"
    )
    out.append(f"## Where it runs\n\n{figures.verified_table(function, spec)}")
    out.append(f"## What it costs\n\n{figures.cost_table(function)}")
    if spec is not None and (OPS / spec.family / "README.md").exists():
        out.append(f"## How it is computed\n\nBy the kernel family [{spec.family}](../families/{spec.family}.md).\n")
        definition = _family_text(readme_definition(OPS / spec.family))
        out.append(definition.replace("](", "](../families/") if "](" in definition else definition)
        out.append(f"Gradients, stable forms, traffic and kernels: [{spec.family}](../families/{spec.family}.md).\n")
    else:
        out.append(
            "## How it is computed\n\nBy PyTorch's own operations; no kernel of this package is specific to it.\n"
        )
    return "\n".join(out)


def losses_index() -> str:
    """All losses by group, each with its first line and a typical cost."""
    out = [
        "# All losses\n",
        f"{len(losses())} functions, each with a module of the same options. "
        "[Choose a loss](../choose.md) says which is for what; a page has its arguments, errors, formula, paper and cost.\n",
    ]
    for title in dict.fromkeys(map(group, losses())):
        mine = [f for f in losses() if group(f) == title]
        out.append(f"## {title}\n")
        out.append("| loss | what it is | cost |\n| --- | --- | --- |")
        for f in mine:
            summary = (inspect.getdoc(f) or "").partition("\n")[0].replace("|", "\\|")
            out.append(f"| [`{f.__name__}`]({f.__name__}.md) | {_escaped(summary)} | {figures.headline_cost(f)} |")
        out.append("")
    return "\n".join(out)


def family_page(family: Path) -> str:
    mine = [f for f in losses() if (s := spec_of(f)) is not None and s.family == family.name]
    text = _family_text((family / "README.md").read_text())
    if mine:
        text += "\n## Losses of this family\n\n" + "\n".join(
            f"- [`{f.__name__}`](../losses/{f.__name__}.md)" for f in mine
        )
    return text + "\n"


def _api_page(title: str, module: ModuleType, names: list[str], intro: str) -> str:
    out = [f"# {title}\n", with_formulas(_escaped(intro))]
    for name in names:
        obj = getattr(module, name)
        if not (inspect.isfunction(obj) or inspect.isclass(obj)):
            continue
        prefix = "kdkernels" if module is kdkernels else module.__name__
        out.append(f"## {name}\n")
        with contextlib.suppress(TypeError, ValueError):  # no signature, as of an exception
            out.append(f"```python\n{signature(obj, f'{prefix}.{name}')}\n```\n")
        out.append(docstring(obj, level=3))
    return "\n".join(out)


def api_pages() -> dict[str, str]:
    """The other public names: classes and helpers of the package, then its subpackages."""
    known = set(losses())
    rest = [
        n for n in kdkernels.__all__
        if (o := getattr(kdkernels, n)) not in known and not (inspect.isclass(o) and issubclass(o, LossModule))
    ]  # fmt: skip
    intro = "What stands beside the losses: layers and their outputs, queues, adapters, the choice of a backend."
    pages = {"api/building-blocks.md": _api_page("Building blocks", kdkernels, rest, intro)}
    packages = ["schemes", "distributed"]
    packages += [f"integrations.{m.name}" for m in pkgutil.iter_modules(kdkernels.integrations.__path__)]
    for path in packages:
        module = importlib.import_module(f"kdkernels.{path}")
        stem = path.rpartition(".")[2]
        pages[f"api/{stem}.md"] = _api_page(
            f"kdkernels.{path}", module, list(module.__all__), inspect.getdoc(module) or ""
        )
    return pages


def pages() -> dict[str, str]:
    """Every generated page: its path on the site, and its markdown."""
    made = {"losses/index.md": losses_index()}
    made |= {f"losses/{f.__name__}.md": loss_page(f) for f in losses()}
    made |= {f"families/{p.name}.md": family_page(p) for p in families()}
    return made | api_pages()


def navigation() -> dict[str, Nav]:
    """What the generated pages add to the menu: by the title of the entry that they go below."""
    by_loss = [
        {title: [f"losses/{f.__name__}.md" for f in losses() if group(f) == title]}
        for title in dict.fromkeys(map(group, losses()))
    ]
    return {
        "Losses": by_loss,
        "How it works": [{"Kernel families": [f"families/{p.name}.md" for p in families()]}],
        "Reference": list(api_pages()),
    }  # type: ignore[dict-item]
