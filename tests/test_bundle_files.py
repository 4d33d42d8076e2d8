"""Copies of the shipped bundle: of a read-only installation, and after a copy that was killed."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest

from monai_iou import bundle_files
from monai_iou.bundle_files import bundle_path, copy_bundle


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundle of an installation to which nobody may write."""
    bundle = Path(shutil.copytree(bundle_path(), tmp_path / "installed" / "bundle"))
    for path in (bundle, *bundle.rglob("*")):
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    monkeypatch.setattr(bundle_files, "bundle_path", lambda: bundle)
    return bundle


def test_the_copy_of_a_read_only_installation_can_be_edited(
    read_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, moved = Path.rename, []

    def recorded(self: Path, target: Path) -> Path:
        # The modes are looked at, as the user of the tests may be root, who may write everywhere.
        moved.append(stat.S_IMODE(self.stat().st_mode) & stat.S_IWUSR)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", recorded)
    target = copy_bundle(tmp_path / "run")
    assert len(moved) == len(list(read_only.iterdir()))
    assert all(moved), "only a folder that its owner can write to can be moved"
    copied = list(target.rglob("*"))
    assert {path.relative_to(target) for path in copied} == {
        path.relative_to(read_only) for path in read_only.rglob("*")
    }
    for path in copied:
        needed = stat.S_IRWXU if path.is_dir() else stat.S_IRUSR | stat.S_IWUSR
        assert path.stat().st_mode & needed == needed, path
