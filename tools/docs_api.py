"""An extension of griffe, which reads the docstrings for docs/api.md: their sections, roles and formulas become Markdown."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from textwrap import dedent
from typing import Any

from griffe import Extension, Object


def _public_names() -> tuple[str, ...]:
    """``clop_kernels.__all__``, read without importing the package, so that building the pages does not need torch."""
    source = (Path(__file__).resolve().parents[1] / "clop_kernels" / "__init__.py").read_text()
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return tuple(ast.literal_eval(statement.value))
    raise ValueError("clop_kernels/__init__.py assigns no __all__")


_PUBLIC_NAMES = _public_names()

_SECTION = re.compile(r"^(Args|Attributes|Example|Raises|Returns):\n((?: +.*(?:\n|\Z)|\n)+)", re.MULTILINE)
_ITEM = re.compile(r"^(\w+(?:, \w+)*): ", re.MULTILINE)
_BLOCK = re.compile(r"^ *\.\. math::(.*\n(?: {4,}.*(?:\n|\Z))*)", re.MULTILINE)
_FORMULA = re.compile(r":math:\s*`([^`]+)`")
_ROLE = re.compile(r":(?:class|data|func|meth|mod):`([^`]+)`")
_EXAMPLE = re.compile(r"(?:^>>> .*(?:\n|\Z))+", re.MULTILINE)
_ERROR = re.compile(r"^([\w.]+Error(?:, [\w.]+Error)*): ", re.MULTILINE)
_TITLES = {"Args": "Arguments"}


class DocstringsAsMarkdown(Extension):
    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(docstring: str) -> str:
    docstring = _BLOCK.sub(lambda block: f"$$\n{' '.join(block[1].split())}\n$$\n", docstring)
    docstring = _FORMULA.sub(lambda formula: f"${' '.join(formula[1].split())}$", docstring)
    docstring = _SECTION.sub(_section, _ROLE.sub(_link, docstring))
    return _EXAMPLE.sub(lambda example: f"\n```python\n{example[0].replace('>>> ', '')}```\n", docstring)


def _section(section: re.Match[str]) -> str:
    name, body = section[1], dedent(section[2])
    if name in ("Args", "Attributes"):
        body = _ITEM.sub(_item, body)
    elif name == "Raises":
        body = _ERROR.sub(_item, body)
    return f"**{_TITLES.get(name, name)}**\n\n{body}\n"


def _item(names: re.Match[str]) -> str:
    return "- " + ", ".join(f"`{name}`" for name in names[1].split(", ")) + ": "


def _link(role: re.Match[str]) -> str:
    """To the entry of docs/api.md, if there is one."""
    path = role[1] if role[1].startswith("clop_kernels.") else f"clop_kernels.{role[1]}"
    is_there = path.removeprefix("clop_kernels.") in _PUBLIC_NAMES and path != "clop_kernels.gradcache"
    return f"[`{role[1]}`][{path}]" if is_there else f"`{role[1]}`"
