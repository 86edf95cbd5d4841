"""All metadata is in pyproject.toml; the native extension comes from tools/native_build.py."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))

from native_build import setup_arguments

setup(**setup_arguments())
