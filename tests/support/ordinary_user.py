"""Permissions as an ordinary user meets them: tests may run as root, who may read and enter everything."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534


@contextmanager
def without_rights(path: Path, mode: int) -> Iterator[None]:
    """Give a path these permissions and be an ordinary user, who is not its owner if root runs the tests.

    All folders above must be open to everyone, which pytest's `tmp_path` is not.
    """
    before, is_root = path.stat().st_mode, os.geteuid() == 0
    path.chmod(mode)
    try:
        if is_root:
            os.seteuid(NOBODY)
        yield
    finally:
        if is_root:
            os.seteuid(0)
        path.chmod(before)
