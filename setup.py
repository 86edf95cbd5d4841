"""All metadata is in pyproject.toml. This file is where the native extension's build will be hooked in."""

from setuptools import setup

setup()
