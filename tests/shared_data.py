"""Where the real images are; tests that need them are skipped without them."""

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("MEDFL_SHARED_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def shared(name: str) -> Path:
    """The real file or folder of that name, or a skipped test."""
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"{path} is absent: set MEDFL_SHARED_DATA to the folder of real images")
    return path
