"""A hook of mkdocs: formulas become MathML while the pages are built, so that a reader's browser needs no script for them."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>',  # what pymdownx.arithmatex leaves
    re.DOTALL,
)
_BAR = re.compile(r"<mo[^>]*>(&#x(?:0007C|02016|02223);)</mo>")  # a browser takes the first of |x| for a relation and adds space


def on_page_content(content: str, **_: object) -> str:
    return _FORMULA.sub(_to_mathml, content)


def _to_mathml(formula: re.Match[str]) -> str:
    latex = html.unescape(formula["latex"])
    if formula["tag"] == "span":
        return _math(latex, "inline")
    return f'<div class="formula">{_math(latex, "block")}</div>'


def _math(latex: str, display: str) -> str:
    return _BAR.sub(r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', convert(latex, display=display))
