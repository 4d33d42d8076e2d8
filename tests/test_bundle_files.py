"""Copies of the shipped bundle: of a read-only installation, and after a copy that was killed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from light_import import LIGHT_IMPORT

from monai_iou import bundle_files
from monai_iou.bundle_files import bundle_path, copy_bundle
from monai_iou.files import TEMPORARY_PREFIX, OutputError, remove_stale, temporary_name


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundle of an installation to which nobody may write."""
    of_runs = shutil.ignore_patterns("eval", "models")  # in a clone in which the bundle was run
    bundle = Path(shutil.copytree(bundle_path(), tmp_path / "installed" / "bundle", ignore=of_runs))
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


KILLED = f"""
{LIGHT_IMPORT}
import os, signal, sys
from pathlib import Path
from monai_iou.bundle_files import copy_bundle
rename = Path.rename
def stopped(self, target):
    if self.name == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = stopped
copy_bundle(sys.argv[1])
"""


def kill_before(name: str, target: Path) -> None:
    """A copy that is killed before it moves a file or folder of the bundle."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), name], check=False)
    assert done.returncode == -signal.SIGKILL


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["LICENSE", "docs", "configs"])
def test_a_copy_that_was_killed_is_completed_by_the_next(name: str, tmp_path: Path) -> None:
    target, whole = tmp_path / "run", copy_bundle(tmp_path / "whole")
    kill_before(name, target)
    assert not (target / "configs").exists()
    left = [path.name for path in target.iterdir() if path.name.startswith(TEMPORARY_PREFIX)]
    assert len(left) == 1
    (target / f"{TEMPORARY_PREFIX}of-another").mkdir()  # a name that this package does not give
    used = target / f"{temporary_name()}used"
    used.mkdir()
    copy_bundle(target)
    assert used.is_dir(), "it belongs to a process that is running"
    used.rmdir()
    (target / f"{TEMPORARY_PREFIX}of-another").rmdir()
    assert content(target) == content(whole)
    assert {path.name for path in target.iterdir()} == {path.name for path in whole.iterdir()}


def test_a_temporary_folder_of_another_machine_is_removed_after_a_day(tmp_path: Path) -> None:
    folders = [tmp_path / f"{TEMPORARY_PREFIX}00000000-1-{name}" for name in ("old", "new")]
    for folder in folders:
        folder.mkdir()
        (folder / "file").touch()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(folders[0], (two_days_ago, two_days_ago))
    kept = tmp_path / "kept"
    kept.mkdir()
    link = tmp_path / folders[0].name.replace("old", "link")
    link.symlink_to(kept)
    remove_stale(tmp_path)
    assert set(tmp_path.iterdir()) == {folders[1], kept, link}


@pytest.mark.parametrize("change", ["LICENSE", "docs/README.md", "docs/mine.md"])
def test_what_the_user_changed_or_added_is_not_taken_for_a_copy(change: str, tmp_path: Path) -> None:
    target = copy_bundle(tmp_path / "run")
    shutil.rmtree(target / "configs")
    (target / change).write_text("mine")
    before = content(target)
    with pytest.raises(ValueError, match="new or empty folder"):
        copy_bundle(target)
    assert content(target) == before


def test_a_disk_that_fills_up_leaves_no_part_of_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")

    target = tmp_path / "run"
    for function in ("copyfile", "copytree"):  # in the list of all failures, and at once
        monkeypatch.setattr(shutil, function, full)
        with pytest.raises(OutputError) as caught:
            copy_bundle(target)
        assert str(caught.value) == (
            f"Expected to copy the bundle to `{target}`, but got the error 'No space left on device': free space or "
            "choose another folder."
        )
        assert not target.exists()
