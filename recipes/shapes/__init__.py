"""The embedded world: short clips of moving coloured shapes with exact ground truth."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""The tiny weights that come with the package."""
