"""Damaged files: never other voxels, never more memory than the file can justify, never a wait."""

from __future__ import annotations

import bz2
import ctypes
import gzip
import os
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
from light_import import LIGHT_IMPORT
from memory_peak import needs_peak, peak_kb, reset_peak

from monai_iou.planning.hardware import detect_hardware
from monai_iou.volumes import memory
from monai_iou.volumes.reading import VolumeError, file_hash, read_channels, read_labels, read_volume

FORMATS = ["a.nii.gz", "a.mha", "a.mhd", "a.nrrd", "b.nrrd"]


def label_map() -> np.ndarray:
    labels = np.zeros((20, 21, 22), np.uint8)
    labels[4:9, 3:12, 5:15] = 1
    labels[6:9, 3:8, 5:9] = 3
    return labels


def write_compressed(folder: Path, name: str, array: np.ndarray) -> list[Path]:
    """Write labels compressed; return the files that hold them, the named one first."""
    path = folder / name
    if name == "b.nrrd":
        path.write_bytes(nrrd_header(array, "bzip2") + bz2.compress(array.tobytes(order="F")))
    elif name == "a.nii.gz":
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    else:
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array.transpose()), str(path), True)
    return [path, path.with_suffix(".zraw")] if name == "a.mhd" else [path]


def nrrd_header(array: np.ndarray, encoding: str) -> bytes:
    sizes = " ".join(map(str, array.shape))
    return f"NRRD0004\ntype: uchar\ndimension: 3\nsizes: {sizes}\nspacings: 1 1 1\nencoding: {encoding}\n\n".encode()


@pytest.mark.parametrize("name", FORMATS)
def test_a_flipped_bit_is_refused_or_harmless(tmp_path: Path, name: str) -> None:
    labels = label_map()
    *_, data = files = write_compressed(tmp_path, name, labels)
    good = data.read_bytes()
    for bit in np.random.default_rng(0).choice(len(good) * 8, min(120, len(good) * 8), replace=False):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << (bit % 8)
        data.write_bytes(bad)
        try:
            got = read_labels(files[0]).array
        except VolumeError:
            continue
        np.testing.assert_array_equal(got, labels, err_msg=f"bit {bit}")


@pytest.mark.parametrize("name", FORMATS)
def test_cut_off_and_continued_files_are_refused(tmp_path: Path, name: str) -> None:
    *_, data = files = write_compressed(tmp_path, name, label_map())
    good = data.read_bytes()
    for bad in (good[:-1], good[:-4], good[:-8], good[: len(good) // 2], good + b"garbage", good + good[-40:]):
        data.write_bytes(bad)
        with pytest.raises(VolumeError, match="copy or write the file again"):
            read_labels(files[0])
    data.write_bytes(good + bytes(100))  # a tape's padding
    np.testing.assert_array_equal(read_labels(files[0]).array, label_map())


def test_several_gzip_members_are_one_stream(tmp_path: Path) -> None:
    raw = nibabel.Nifti1Image(label_map(), np.eye(4)).to_bytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(raw[:3000]) + gzip.compress(raw[3000:]))
    np.testing.assert_array_equal(read_labels(tmp_path / "a.nii.gz").array, label_map())


@pytest.mark.parametrize("name", ["a.nii", "a.mha", "a.nrrd"])
def test_files_that_hold_more_or_less_than_they_say(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(label_map()), str(path), False)
    good = path.read_bytes()
    for bad in (good[:-1], good + b"\1", good + bytes(5000)):
        path.write_bytes(bad)
        with pytest.raises(VolumeError):
            read_volume(path)


def test_a_damaged_field_name_is_no_field_of_the_users(tmp_path: Path) -> None:
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(label_map()), str(tmp_path / "a.mha"))
    good = (tmp_path / "a.mha").read_bytes()
    (tmp_path / "a.mha").write_bytes(good.replace(b"Offset", b"Ofgset"))
    with pytest.raises(VolumeError, match="an undamaged header with the field `Offset`, but got `Ofgset`"):
        read_volume(tmp_path / "a.mha")
    (tmp_path / "a.mha").write_bytes(good.replace(b"CenterOfRotation", b"MyOwnField"))
    read_volume(tmp_path / "a.mha")


def claims(size: int) -> dict[str, bytes]:
    """Files of a few hundred bytes whose headers claim size^3 voxels."""
    image = nibabel.Nifti1Image(np.zeros((1, 1, 1), np.uint8), np.eye(4))
    raw = bytearray(image.to_bytes())
    np.frombuffer(raw, nibabel.nifti1.header_dtype, count=1)["dim"] = (3, size, size, size, 1, 1, 1, 1)
    mha = (
        f"ObjectType = Image\nNDims = 3\nDimSize = {size} {size} {size}\nElementSpacing = 1 1 1\n"
        "ElementType = MET_UCHAR\n"
    )
    some = bytes(500)
    header = nrrd_header(np.empty((0, 0, 0)), "gzip").replace(b"0 0 0", f"{size} {size} {size}".encode())
    return {
        "a.nii": bytes(raw),
        "a.nii.gz": gzip.compress(bytes(raw)),
        "raw.mha": f"{mha}ElementDataFile = LOCAL\n".encode() + some,
        "zlib.mha": f"{mha}CompressedData = True\nElementDataFile = LOCAL\n".encode() + zlib.compress(some),
        "gzip.nrrd": header + gzip.compress(some),
        "bzip2.nrrd": header.replace(b"gzip", b"bzip2") + bz2.compress(some),
    }


@needs_peak
@pytest.mark.parametrize("size", [1380, 32767])
def test_a_claim_that_the_file_cannot_hold_takes_no_memory(tmp_path: Path, size: int) -> None:
    for name, content in claims(size).items():
        (tmp_path / name).write_bytes(content)
        reset_peak()
        before = peak_kb()
        for read in (read_volume, read_labels, lambda path: read_channels([path])):
            with pytest.raises(VolumeError, match=r"^Expected `.*\.$"):
                read(tmp_path / name)
        assert peak_kb() - before < 30_000, name


@needs_peak
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.nii.gz", "wb") as bomb:
        bomb.write(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)).to_bytes())
        for _ in range(200):
            bomb.write(bytes(1 << 20))
    reset_peak()
    before = peak_kb()
    with pytest.raises(VolumeError, match="to end after its 8 bytes of voxels, but got more data"):
        read_volume(tmp_path / "a.nii.gz")
    assert peak_kb() - before < 30_000


@needs_peak
def test_the_peak_of_memory_sees_what_was_taken_and_freed() -> None:
    earlier = np.ones(40 << 20)
    del earlier
    reset_peak()
    before = peak_kb()
    taken = np.ones(20 << 20)
    assert peak_kb() - before > taken.nbytes // 1024 // 2


def test_what_does_not_fit_into_memory_is_refused_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((20, 20, 20)), np.eye(4)), tmp_path / "a.nii.gz")
    monkeypatch.setattr(memory, "RESERVE", 0)
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    with pytest.raises(VolumeError) as error:
        read_volume(tmp_path / "a.nii.gz")
    assert str(error.value) == (
        f"Expected `{tmp_path / 'a.nii.gz'}` to fit into the free memory, but got 5.96e-05 GiB for shape 20x20x20 with "
        "9.31e-07 GiB free: correct its header, free memory, or read it on a machine with more memory."
    )


def test_readers_at_once_share_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "RESERVE", 0)
    monkeypatch.setattr(memory, "free_memory", lambda: 250)
    most: list[int] = []

    def read(_: int) -> None:
        with memory.room_for(tmp_path, 100, (100,)):
            most.append(memory._BUDGET.promised)
            time.sleep(0.01)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(most) == 8
    assert max(most) == 200
    assert memory._BUDGET.promised == 0


def test_a_limit_on_the_process_counts_as_its_memory() -> None:
    resource = pytest.importorskip("resource")
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = 1 << 40 if most == resource.RLIM_INFINITY else most
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))\n{LIGHT_IMPORT}"
        "from monai_iou.volumes.memory import _of_process; print(_of_process()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < limit


CACHED = 300 << 20
STATISTICS = {
    "none": ("", 0),
    "version 2": (f"anon 1000\nfile {2 * CACHED}\ninactive_file {CACHED - 7}\nactive_file 7\n", CACHED),
    "version 1": (
        f"inactive_file 5\nactive_file 6\ntotal_inactive_file {CACHED - 9}\ntotal_active_file 9\n",
        CACHED,
    ),
    "damaged": ("inactive_file\n", 0),
}


@pytest.mark.parametrize("kind", STATISTICS)
def test_files_that_a_container_keeps_in_memory_do_not_count_as_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    statistics, cached = STATISTICS[kind]
    limit, used = 1 << 30, (1 << 30) - (30 << 20)
    for name, text in (("memory.max", str(limit)), ("memory.current", str(used)), ("memory.stat", statistics)):
        (tmp_path / name).write_text(text)
    limits = ((str(tmp_path / "memory.max"), str(tmp_path / "memory.current")),)
    monkeypatch.setattr(memory, "_CGROUP_LIMITS", limits)
    monkeypatch.setattr(memory, "_of_kernel", lambda: [1 << 40])
    free = (30 << 20) + cached
    assert memory.free_memory() == free
    assert detect_hardware("cpu").step_bytes == free // 2
    nibabel.save(nibabel.Nifti1Image(np.zeros((64, 1024, 1024), np.uint8), np.eye(4)), tmp_path / "a.nii")
    if cached:
        assert read_volume(tmp_path / "a.nii").array.shape == (64, 1024, 1024)
    else:
        with pytest.raises(VolumeError, match="to fit into the free memory"):
            read_volume(tmp_path / "a.nii")
    (tmp_path / "memory.current").write_text("0")
    assert memory.free_memory() == limit, "never more than the limit"


def test_windows_says_how_much_memory_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free: list[int] = []

    def fill(reference: Any) -> int:
        status = reference._obj
        assert status.length == ctypes.sizeof(status) == 64, "as Windows checks it"
        status.available, status.available_with_swap = free
        return 1

    def absent(*_: Any, **__: Any) -> None:
        raise FileNotFoundError

    windows = SimpleNamespace(GlobalMemoryStatusEx=fill)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=windows), raising=False)
    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setattr(os, "sysconf", absent)
    monkeypatch.setattr(memory, "resource", None)
    places = {name: getattr(memory._MemoryStatus, name).offset for name in ("available", "available_with_swap")}
    assert places == {"available": 16, "available_with_swap": 32}, "those of ullAvailPhys and ullAvailPageFile"
    for free[:] in ([3 << 30, 9 << 30], [9 << 30, 3 << 30]):
        assert memory.free_memory() == 3 << 30
        assert detect_hardware("cpu").step_bytes == 3 << 29
    windows.GlobalMemoryStatusEx = lambda _: 0
    assert memory.free_memory() is None
    monkeypatch.delattr(ctypes, "windll")
    assert memory.free_memory() is None
    with pytest.raises(ValueError, match="this system does not say: give `--memory-gb`"):
        detect_hardware("cpu")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "a.nrrd", "a.png"])
def test_pipes_and_devices_are_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "pipe").mkdir()
    (tmp_path / "zero").mkdir()
    os.mkfifo(tmp_path / "pipe" / name)
    (tmp_path / "zero" / name).symlink_to("/dev/zero")
    for kind, found in (("pipe", "a pipe"), ("zero", "a device")):
        with pytest.raises(VolumeError, match=f"to be a file, but got {found}: name a file that contains a volume"):
            read_labels(tmp_path / kind / name)
        with pytest.raises(OSError, match=found):
            file_hash(tmp_path / kind / name)


def test_detached_data_may_not_be_a_device(tmp_path: Path) -> None:
    (tmp_path / "a.mhd").write_text(
        "ObjectType = Image\nNDims = 1\nDimSize = 9\nElementSpacing = 1\nElementType = MET_UCHAR\n"
        "ElementDataFile = /dev/zero\n"
    )
    with pytest.raises(VolumeError, match="but got a device"):
        read_volume(tmp_path / "a.mhd")
    assert len(file_hash(tmp_path / "a.mhd")) == 64  # of the header alone: its data are not opened


def write_list(path: Path, shape: tuple[int, ...], contents: list[bytes]) -> Path:
    """Write a header with a list of files, each with some of the voxels."""
    for number, content in enumerate(contents):
        (path.parent / f"s{number}.raw").write_bytes(content)
    names = "\n".join(f"s{number}.raw" for number in range(len(contents)))
    axes, sizes, ones = len(shape), " ".join(map(str, shape)), " ".join("1" * len(shape))
    if path.suffix == ".mhd":
        head = f"ObjectType = Image\nNDims = {axes}\nDimSize = {sizes}\nElementSpacing = {ones}\n"
        path.write_text(f"{head}ElementType = MET_UCHAR\nElementDataFile = LIST\n{names}\n")
    else:
        head = f"NRRD0004\ntype: uchar\ndimension: {axes}\nsizes: {sizes}\nspacings: {ones}\nencoding: raw\n"
        path.write_text(f"{head}data file: LIST\n{names}\n")
    return path


@pytest.mark.parametrize("name", ["a.mhd", "a.nhdr"])
def test_a_list_of_files_divides_into_whole_slices(tmp_path: Path, name: str) -> None:
    array = np.zeros((64, 64, 60), np.uint8)
    array[20:40, 20:40] = np.arange(60) + 1
    slices = [array[..., k].tobytes(order="F") for k in range(60)]
    for each in (1, 2, 20, 60):
        grouped = [b"".join(slices[k : k + each]) for k in range(0, 60, each)]
        np.testing.assert_array_equal(read_volume(write_list(tmp_path / name, array.shape, grouped)).array, array)
    for contents in ([*slices, slices[-1]], slices[:-1], [s for s in slices for _ in "ab"], slices[:40]):
        problem = f"to name files of equally many slices, but got {len(contents)} for 64x64x60: correct the list of its"
        with pytest.raises(VolumeError, match=problem):
            read_volume(write_list(tmp_path / name, array.shape, contents))


def test_the_files_of_a_list_may_be_the_slices_of_several_volumes(tmp_path: Path) -> None:
    array = np.arange(144, dtype=np.uint8).reshape(3, 4, 6, 2)
    slices = [array[..., k, channel].tobytes(order="F") for channel in range(2) for k in range(6)]
    for each in (1, 2, 6, 12):
        grouped = [b"".join(slices[k : k + each]) for k in range(0, 12, each)]
        got = read_channels([write_list(tmp_path / "a.mhd", array.shape, grouped)]).array
        np.testing.assert_array_equal(np.moveaxis(got, 0, -1), array)
    with pytest.raises(VolumeError, match="to name files of equally many slices, but got 8 for 3x4x6x2"):
        read_channels([write_list(tmp_path / "a.mhd", array.shape, slices[:8])])
