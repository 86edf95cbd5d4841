"""All metadata is in pyproject.toml. This file only adds the native extension, which tools/native_build.py builds."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))

from native_build import setup_arguments

setup(**setup_arguments())
