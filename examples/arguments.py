"""Types for the examples' command lines. A wrong value is an error that says what was expected."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def number(kind: type[int] | type[float], is_valid: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """A parser for one argument. argparse puts the argument's name before the message."""

    def parse(text: str) -> float:
        try:
            if is_valid(value := kind(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")

    return parse


def png(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: expected the path of a file that ends in .png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a folder that can be made ({error})") from None
    return path


COUNT = number(int, lambda n: n >= 1, "an integer of at least 1")
SEED = number(int, lambda n: 0 <= n < 2**32, "an integer from 0 to 2^32 - 1")
