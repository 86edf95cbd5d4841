"""What tests share: the oracle, problems, stand-ins for a driver and for process groups."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""
