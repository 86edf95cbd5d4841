"""A hook of mkdocs: pages link to files of the repository outside docs/, as on GitHub, and the site gets a copy of each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
_OUTSIDE = re.compile(r"\]\(\.\./((?:benchmarks/results|examples)/[^)#]+)")
_IMAGE = re.compile(r"!\[[^\]]*\]\(([\w.-]+\.png)\)")  # of a report: in its own folder


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    pages = [file for file in files.documentation_pages() if file.abs_src_path]
    linked = {path for page in pages for path in _OUTSIDE.findall(page.content_string)}
    for path in [path for path in linked if path.endswith(".md")]:
        report = ROOT / path
        linked |= {str(Path(path).with_name(name)) for name in _IMAGE.findall(report.read_text())}
    for path in sorted(linked):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return _OUTSIDE.sub(r"](\1", markdown)
