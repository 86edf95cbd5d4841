"""A hook of mkdocs: formulas become MathML while the pages are built, so that a reader's browser needs no script for them."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>',  # what pymdownx.arithmatex leaves
    re.DOTALL,
)


def on_page_content(content: str, **_: object) -> str:
    return _FORMULA.sub(_to_mathml, content)


def _to_mathml(formula: re.Match[str]) -> str:
    latex = html.unescape(formula["latex"])
    return str(convert(latex, display="block" if formula["tag"] == "div" else "inline"))
