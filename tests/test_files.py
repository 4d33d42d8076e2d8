"""Writing files: whole or not at all, under private names, and never over an input."""

from __future__ import annotations

import doctest
import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from light_import import LIGHT_IMPORT

from monai_iou import files
from monai_iou.files import OutputError, check_outputs, prepare, replaced_file, temporary_file, write_text, write_texts


def test_examples() -> None:
    assert doctest.testmod(files, optionflags=doctest.ELLIPSIS).failed == 0


def test_a_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail() -> None:
        with replaced_file(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    write_text(path, "new\r\nline")
    assert path.read_bytes() == b"new\r\nline"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("folder", ["a.csv", "b.json", "c.html"])
def test_files_that_belong_together_are_all_the_old_or_all_the_new_ones(tmp_path: Path, folder: str) -> None:
    paths = [tmp_path / name for name in ("a.csv", "b.json", "c.html", "new.txt")]
    for path in paths[:-1]:
        path.write_text(f"old {path.name}")
    (tmp_path / folder).unlink()
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "x").touch()
    for order in (paths, paths[::-1]):
        with pytest.raises(OutputError) as caught:
            write_texts(dict.fromkeys(order, "new"))
        sentence = f"Expected to write `{tmp_path / folder}`, but got the error 'Is a directory': free space or choose"
        assert str(caught.value).startswith(sentence)
        kept = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
        assert kept == {path.name: f"old {path.name}" for path in paths[:-1] if path.name != folder}
    (tmp_path / folder / "x").unlink()
    (tmp_path / folder).rmdir()
    write_texts(dict.fromkeys(paths, "new"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {path.name: "new" for path in paths}


@pytest.mark.parametrize("links", [True, False])
def test_a_rename_that_fails_puts_back_files_and_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c", "d")]
    (tmp_path / "victim").write_text("mine")
    paths[0].write_text("old")
    paths[1].symlink_to(tmp_path / "victim")
    paths[3].write_text("old")
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:  # as for a table that another program has open on Windows
        if target == paths[3]:
            raise PermissionError(13, "Permission denied")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    if not links:
        monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(1, "Operation not permitted")))
    with pytest.raises(OutputError, match=r"to write `.*/d`, but got the error 'Permission denied'"):
        write_texts(dict.fromkeys(paths, "new"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "d", "victim"]
    assert (paths[0].read_text(), paths[1].is_symlink(), paths[3].read_text()) == ("old", True, "old")
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_link_at_the_target_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "a.txt").symlink_to(victim)
    write_text(tmp_path / "a.txt", "new")
    assert victim.read_text() == "mine"
    assert (tmp_path / "a.txt").read_text() == "new"
    assert not (tmp_path / "a.txt").is_symlink()


def test_a_planted_link_at_the_temporary_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "known")
    with temporary_file(tmp_path) as path:
        pass
    path.symlink_to(victim)
    with pytest.raises(OutputError, match="File exists"):
        prepare(tmp_path)
    with pytest.raises(OutputError, match="File exists"):
        write_text(tmp_path / "a.txt", "new")
    assert victim.read_text() == "mine"


def test_writers_of_one_file_have_names_of_their_own(tmp_path: Path) -> None:
    path, barrier, names = tmp_path / "a.txt", threading.Barrier(8), []

    def write(number: int) -> None:
        with replaced_file(path, ".txt") as temporary:
            names.append(temporary.name)
            temporary.write_text(str(number) * 1000)
            barrier.wait(timeout=30)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names)) == 8
    assert all(name.endswith(".txt") for name in names)
    assert len(set(path.read_text())) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    code = (
        f"{LIGHT_IMPORT}import os, signal; from pathlib import Path; from monai_iou.files import temporary_file\n"
        f"with temporary_file(Path({str(tmp_path)!r})) as path:\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = tmp_path.iterdir()
    foreign = tmp_path / f"{files.TEMPORARY_PREFIX}00000000-1-ab"
    old = tmp_path / f"{files.TEMPORARY_PREFIX}00000000-1-cd"
    for path in (foreign, old):
        path.touch()
    os.utime(old, (1, 1))
    with temporary_file(tmp_path) as own:
        prepare(tmp_path)
        assert own.exists()
    assert not left.exists()
    assert not old.exists()
    assert list(tmp_path.iterdir()) == [foreign]


@pytest.mark.parametrize("kind", ["file", "file above", "long", "proc", "full"])
def test_folders_that_cannot_be_written(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    folder = {
        "file": tmp_path / "file",
        "file above": tmp_path / "file" / "x",
        "long": tmp_path / ("x" * 300),
        "proc": Path("/proc/nothing/x"),
        "full": tmp_path / "full",
    }[kind]
    if kind == "full":
        monkeypatch.setattr(files, "_write_through", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OutputError) as caught:
        prepare(folder, "ckpt_dir")
    sentence = str(caught.value)
    assert sentence.startswith(f"Expected `ckpt_dir` to be a folder that can be written, but got `{folder}` (")
    assert sentence.endswith("): choose another folder.")


def test_outputs_are_compared_with_inputs_by_what_they_are(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    scan = images / "a.nii.gz"
    scan.touch()
    (tmp_path / "link").symlink_to(images)
    os.link(scan, tmp_path / "second name")
    source = {"the images": [scan]}
    for output, relation in {
        images: "is the folder of",
        tmp_path / "link": "is the folder of",
        images / ".." / "images": "is the folder of",
        scan: "is",
        tmp_path / "second name": "is",
        tmp_path / "link" / "a.nii.gz": "is",
    }.items():
        with pytest.raises(OutputError) as caught:
            check_outputs({"output_dir": output}, source)
        expected = f"Expected `output_dir` to be apart from the images, but `{output}` {relation} `{scan}`, which"
        assert str(caught.value).startswith(expected)
    check_outputs({"output_dir": tmp_path, "ckpt_dir": images / "masks", "a": images / "new.nii.gz"}, source)


def test_outputs_in_folders_that_are_read_whole(tmp_path: Path) -> None:
    below = tmp_path / "predictions" / "scores"
    below.mkdir(parents=True)
    (tmp_path / "predictions" / "notes.txt").touch()
    source = {"the predictions": [tmp_path / "predictions"]}
    for output in (tmp_path / "predictions", below, below / "new"):
        with pytest.raises(OutputError, match="to be apart from the predictions, but"):
            check_outputs({"--output": output}, source)
    check_outputs({"--output": tmp_path / "predictions2"}, source)
    check_outputs({"--output": tmp_path}, source)
    check_outputs({"--output": tmp_path / "predictions" / "notes.txt"}, source)


def test_a_file_is_flushed_by_a_descriptor_that_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows refuses to flush a file that is open for reading alone; POSIX does not care."""
    fcntl = pytest.importorskip("fcntl")

    def as_on_windows(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(os, "fsync", as_on_windows)
    write_text(tmp_path / "table.csv", "text")
    with replaced_file(tmp_path / "mask.nii.gz", ".nii.gz") as temporary:
        temporary.write_bytes(b"mask")
    assert (tmp_path / "mask.nii.gz").read_bytes() == b"mask"
