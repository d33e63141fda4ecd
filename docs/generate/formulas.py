"""Turns the plain-text formulas of docstrings and READMEs into MathML.

They are written to be read in a terminal, `dD/ds = (g_s - p_s G_s) / T_s`, and MathML is what browsers set without a script
or a font from elsewhere. What is known: subscripts and powers with or without brackets, Greek names, sums, comparisons.
"""

from __future__ import annotations

import ast
import html
import re
import textwrap

GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "eps": "ε", "lambda": "λ", "mu": "μ", "phi": "φ", "rho": "ρ",
    "sigma": "σ", "tau": "τ", "theta": "θ", "pi": "π",
}  # fmt: skip
OPERATORS = {
    "<-": "←", "->": "→", "<=": "≤", ">=": "≥", "!=": "≠", "+=": "+=", "*=": "*=", "-": "−", "*": "·", ".": "·",
}  # fmt: skip
LARGE = {"sum": "∑", "prod": "∏"}
TOKEN = re.compile(
    r"(?P<gap>\s{2,})|(?P<space>\s)|(?P<number>\d+(?:\.\d+)?|\.\d+)|(?P<name>[A-Za-z][A-Za-z0-9]*'*)"
    r"|(?P<operator><-|->|<=|>=|!=|\+=|\*=|.)"
)
Token = tuple[str, str]


def _tokens(line: str) -> list[Token]:
    return [(str(m.lastgroup), m[0]) for m in TOKEN.finditer(line)]


class _Line:
    """One line of a formula, read from left to right."""

    def __init__(self, line: str):
        self.tokens, self.at = _tokens(line), 0

    def peek(self, ahead: int = 0) -> Token:
        place = self.at + ahead
        return self.tokens[place] if 0 <= place < len(self.tokens) else ("end", "")

    def next(self) -> Token:
        self.at += 1
        return self.peek(-1)

    def row(self, until: str = "") -> str:
        """Everything up to a closing bracket, which is read too."""
        parts = []
        while self.at < len(self.tokens):
            if until and self.peek()[1] == until:
                self.next()
                break
            parts.append(self.scripted())
        return "".join(parts)

    def scripted(self) -> str:
        """An atom with what is below and above it."""
        large = self.peek()[1] in LARGE
        base = self.atom()
        below = above = ""
        while self.peek()[1] in ("_", "^") and self.peek(1)[0] not in ("end", "space", "gap"):
            if self.next()[1] == "_":
                below = self.script()
            else:
                above = self.script()
        if below and above:
            return (
                f"<{'munderover' if large else 'msubsup'}>{base}{below}{above}</{'munderover' if large else 'msubsup'}>"
            )
        if below:
            return f"<{'munder' if large else 'msub'}>{base}{below}</{'munder' if large else 'msub'}>"
        return f"<msup>{base}{above}</msup>" if above else base

    def script(self) -> str:
        kind, text = self.peek()
        if text in ("(", "{"):
            self.next()
            return f"<mrow>{self.row(')' if text == '(' else '}')}</mrow>"
        if text == "-":
            self.next()
            return f"<mrow><mo>−</mo>{self.scripted()}</mrow>"
        if text == "|":  # e^-|a - b|
            self.next()
            return f"<mrow><mo>|</mo>{self.row('|')}<mo>|</mo></mrow>"
        if kind == "name" and text not in GREEK:
            self.next()
            letters = list(text) if re.fullmatch("[a-eijkl]{2,3}", text) else [text]  # ij is two indices
            return f"<mrow>{''.join(f'<mi>{letter}</mi>' for letter in letters)}</mrow>"
        return self.atom()

    def atom(self) -> str:
        kind, text = self.next()
        if kind == "gap":
            return '<mspace width="2em"></mspace>'
        if kind == "space":
            return ""
        if kind == "number":
            return f"<mn>{text}</mn>"
        if kind == "name":
            return self.name(text)
        return f"<mo>{html.escape(OPERATORS.get(text, text))}</mo>"

    def name(self, text: str) -> str:
        bare = text.rstrip("'")
        primes = "<mo>′</mo>" * (len(text) - len(bare))
        if bare in LARGE:
            return f"<mo>{LARGE[bare]}</mo>"
        if bare in GREEK:
            return f"<mi>{GREEK[bare]}</mi>" if not primes else f"<mrow><mi>{GREEK[bare]}</mi>{primes}</mrow>"
        if bare == "x" and self.is_product():
            return "<mo>×</mo>"
        if re.fullmatch(r"[A-Za-z]\d*", bare):
            return f"<mi>{bare}</mi>" if not primes else f"<mrow><mi>{bare}</mi>{primes}</mrow>"
        if re.fullmatch(r"d[A-Zabdfghstwxyz]", bare):  # a differential
            return f"<mrow><mi>d</mi><mi>{bare[1]}</mi></mrow>"
        if self.peek()[1] in ("(", "_", "^") or bare in ("log", "exp", "max", "min", "sign", "clamp"):
            return f"<mi>{bare}</mi><mo>&#x2061;</mo>" if self.peek()[1] not in ("_", "^") else f"<mi>{bare}</mi>"
        return f"<mtext>&#160;{bare}&#160;</mtext>"

    def is_product(self) -> bool:
        """`N x V`: the x between two sizes."""
        before, after = self.peek(-3), self.peek(1)
        return self.peek(-2)[0] == self.peek()[0] == "space" and before[1].isupper() and after[1].isupper()


def mathml(text: str) -> str:
    """A formula of one or more lines as a MathML block."""
    lines = [line for line in textwrap.dedent(text).splitlines() if line.strip()]
    rows = []
    for line in lines:
        indent = '<mspace width="2em"></mspace>' if line.startswith(" ") else ""
        rows.append(f'<mtr><mtd columnalign="left">{indent}{_Line(line.strip()).row()}</mtd></mtr>')
    return (
        f'<div class="formula"><math display="block"><mtable columnalign="left">{"".join(rows)}</mtable></math></div>'
    )


def _is_python(block: str) -> bool:
    try:
        ast.parse(textwrap.dedent(block))
    except SyntaxError:
        return False
    return True


def with_formulas(markdown: str) -> str:
    """Markdown whose indented blocks are MathML where they are formulas, and code where they are Python.

    It also puts the empty lines before lists and tables that GitHub does not need and Python-Markdown does.
    """
    out: list[str] = []
    lines = markdown.splitlines()
    i, in_list, in_fence = 0, False, False
    while i < len(lines):
        line = lines[i]
        if line.startswith("```"):
            in_fence = not in_fence
        before = out[-1] if out else ""
        if in_fence:
            out.append(line)
            i += 1
            continue
        if line.startswith("    ") and not in_list and (not before or before.startswith(("#", "<!--"))):
            block = []
            while i < len(lines) and (lines[i].startswith("    ") or not lines[i].strip()):
                block.append(lines[i])
                i += 1
            text = "\n".join(block).rstrip()
            made = f"```python\n{textwrap.dedent(text)}\n```" if _is_python(text) else mathml(text)
            out += [*([""] if before else []), made, ""]
            continue
        item = re.match(r"[-*] |\d+\. ", line)
        row = line.startswith("|")
        if before.strip() and ((item and not in_list) or (row and not before.startswith("|"))):
            out.append("")
        if item:
            in_list = True
        elif not line.startswith(" ") and not before.strip():
            in_list = False
        out.append(line)
        i += 1
    return "\n".join(out) + "\n"
