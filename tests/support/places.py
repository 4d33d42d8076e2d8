"""Where the checkout and what stands beside it lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SHARED = ROOT.parent / "shared"
DATA = SHARED / "data"  # real volumes, which are never committed: tests that need them skip without them
