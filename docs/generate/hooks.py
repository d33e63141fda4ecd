"""What mkdocs runs: adds the generated pages and their menus, and fills in figures and drawings."""

from __future__ import annotations

import re
from typing import Any

import figures
import reference
from formulas import with_formulas
from mkdocs.structure.files import File


def on_config(config: Any) -> Any:
    added = reference.navigation()
    for entry in config.nav:
        for title, children in entry.items():
            if title in added:
                children += added[title]
    return config


def on_files(files: Any, config: Any) -> Any:
    made = reference.pages()
    made["contributing.md"] = (reference.ROOT / "CONTRIBUTING.md").read_text()
    made["distributed.md"] = with_formulas((reference.ROOT / "kdkernels/distributed/README.md").read_text())
    made["changelog.md"] = (reference.ROOT / "CHANGELOG.md").read_text()
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    text = figures.filled(markdown)
    if page.file.generated_by is None:
        text = re.sub(r"(?s)```math\n(.*?)```", lambda m: with_formulas("\n" + re.sub("(?m)^", "    ", m[1])), text)
    return text
