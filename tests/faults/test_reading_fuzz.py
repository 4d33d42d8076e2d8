"""Mutated files: never another value, a crash, a hang, or more memory than the file can justify."""

from __future__ import annotations

import bz2
import gzip
import json
import struct
import time
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory_peak import CAN_RESET, peak_kb, reset_peak

from monai_iou.datasets.cases import DatasetError
from monai_iou.datasets.folder import read_folder
from monai_iou.volumes.reading import VolumeError, file_hash, read_channels, read_labels, read_volume

pytestmark = pytest.mark.slow

FLIPS = 300
MOST_SECONDS = 10.0
MOST_KB = 60_000
RNG = np.random.default_rng(0)
LABELS = np.zeros((24, 25, 26), np.int16)
LABELS[5:12, 4:14, 6:18] = 1
LABELS[8:10, 9:12, 10:13] = 700


def write(folder: Path, name: str) -> list[Path]:
    """Write the label map compressed; return the named file and, if they lie apart, that of the data."""
    path = folder / name
    if name == "bz2.nrrd":
        header = (
            "NRRD0004\ntype: short\ndimension: 3\nsizes: 24 25 26\nspacings: 1 1 1\nendian: little\nencoding: bzip2\n\n"
        )
        path.write_bytes(header.encode() + bz2.compress(LABELS.tobytes(order="F")))
    elif name.startswith("nifti2"):
        nibabel.save(nibabel.Nifti2Image(LABELS, np.eye(4)), path)
    elif name.endswith((".nii.gz", ".nii")):
        nibabel.save(nibabel.Nifti1Image(LABELS, np.eye(4)), path)
    else:
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(LABELS.transpose()), str(path), not name.startswith("raw"))
    return [path, path.with_suffix(".zraw")] if name == "a.mhd" else [path]


def guarded(read: Callable[[], object]) -> object | None:
    """What a reader returns, None if it refused in one sentence; within seconds and a bounded memory."""
    if CAN_RESET:
        reset_peak()
    start, before = time.process_time(), peak_kb() if CAN_RESET else 0
    text = ""
    try:
        return read()
    except (VolumeError, DatasetError) as error:
        text = str(error)
        return None
    finally:
        assert not text or (text.startswith("Expected ") and text.endswith(".") and "\n" not in text)
        assert time.process_time() - start < MOST_SECONDS
        assert not CAN_RESET or peak_kb() - before < MOST_KB


@pytest.mark.parametrize("name", ["a.nii.gz", "nifti2.nii.gz", "a.mha", "a.mhd", "a.nrrd", "bz2.nrrd"])
def test_300_of_300_flipped_bits_of_a_compressed_label_are_refused_or_harmless(tmp_path: Path, name: str) -> None:
    *_, data = files = write(tmp_path, name)
    good = data.read_bytes()
    for bit in RNG.choice(len(good) * 8, FLIPS, replace=False):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << (bit % 8)
        data.write_bytes(bad)
        volume = guarded(lambda: read_labels(files[0]))
        if volume is not None:
            np.testing.assert_array_equal(volume.array, LABELS, err_msg=f"bit {bit}")  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "raw.mha", "a.mha", "raw.nrrd", "a.nrrd", "bz2.nrrd"])
def test_mutated_headers_end_in_a_volume_or_a_sentence(tmp_path: Path, name: str) -> None:
    (path,) = write(tmp_path, name)
    packed = name.endswith(".gz")
    good = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()

    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        edits=st.lists(st.tuples(st.integers(0, 350), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
        cut=st.none() | st.integers(0, 600),
    )
    def mutate(edits: list[tuple[int, bytes]], cut: int | None) -> None:
        bad = bytearray(good)
        for place, content in edits:
            bad[place : place + len(content)] = content
        content = bytes(bad[:cut])
        path.write_bytes(gzip.compress(content, 1) if packed else content)
        for read in (read_volume, read_labels, lambda file: read_channels([file]), file_hash):
            guarded(lambda read=read: read(path))  # type: ignore[misc]

    mutate()


NUMBERS = st.sampled_from(
    [0, 1, -1, 2**31 - 1, 32767, 1380, 10**18, 0.5, 1e30, -1e30, float("nan"), float("inf"), 1e-30]
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(field=st.sampled_from(list(nibabel.nifti1.header_dtype.names)), value=NUMBERS, index=st.integers(0, 7))
def test_every_field_of_nifti_may_hold_any_number(tmp_path_factory, field: str, value: float, index: int) -> None:
    path = tmp_path_factory.getbasetemp() / "field.nii"
    raw = bytearray(nibabel.Nifti1Image(LABELS, np.eye(4)).to_bytes())
    dtype, offset = nibabel.nifti1.header_dtype.fields[field][:2]  # type: ignore[index]
    base = dtype.base if dtype.subdtype else dtype
    if base.kind in "if":
        place = offset + base.itemsize * (index % (dtype.itemsize // base.itemsize))
        with np.errstate(all="ignore"):
            wrapped = np.array([0 if value != value and base.kind == "i" else value]).astype("f8")
            number = wrapped if base.kind == "f" else np.clip(wrapped, np.iinfo(base).min, np.iinfo(base).max)
            raw[place : place + base.itemsize] = number.astype(base).tobytes()
    path.write_bytes(raw)
    for read in (read_volume, read_labels, lambda file: read_channels([file])):
        guarded(lambda read=read: read(path))  # type: ignore[misc]


LINES = [
    b"0", b"-1", b"1e30", b"nan", b"9" * 400, b"32767 32767 32767", b"", b"LIST", b"True", b"%d 1 9 1", b"/dev/zero",
    b"(0,0,0) (0,0,0) (0,0,0)", b"none none none", b"1380 1380 1380",
]  # fmt: skip


@pytest.mark.parametrize("name", ["raw.mha", "raw.nrrd"])
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_line_of_a_text_header_may_say_anything(tmp_path_factory, name: str, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    (path,) = write(folder, name)
    content = path.read_bytes()
    end = content.index(b"LOCAL\n") + 6 if name.endswith("mha") else content.index(b"\n\n") + 2
    lines = content[:end].split(b"\n")
    place = data.draw(st.integers(0, len(lines) - 2))
    separator = b" = " if name.endswith("mha") else b": "
    key = lines[place].split(separator)[0]
    values = st.sampled_from(LINES)
    lines[place] = key + separator + data.draw(values | st.binary(max_size=20))
    path.write_bytes(b"\n".join(lines) + content[end:])
    for read in (read_volume, read_labels, file_hash):
        guarded(lambda read=read: read(path))  # type: ignore[misc]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_dataset_json_with_anything_in_it(tmp_path_factory, data: st.DataObject) -> None:
    root = tmp_path_factory.getbasetemp() / "dataset"
    for part in ("imagesTr", "labelsTr"):
        if not (root / part / "c.nii.gz").exists():
            (root / part).mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(LABELS, np.eye(4)), root / part / "c.nii.gz")
    content = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "x", "700": "y"},
        "training": [{"image": "imagesTr/c.nii.gz", "label": "labelsTr/c.nii.gz"}],
    }
    key = data.draw(
        st.sampled_from([*content, "test", "validation", "test_labelled", "patient_groups", "channel_names"])
    )
    changed = {**content, key: data.draw(JSON)}
    (root / "dataset.json").write_text(json.dumps(changed), encoding="utf-8")
    guarded(lambda: read_folder(root).training_facts)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=300))
def test_dataset_json_of_any_bytes(tmp_path_factory, content: bytes) -> None:
    root = tmp_path_factory.getbasetemp() / "bytes"
    root.mkdir(exist_ok=True)
    (root / "dataset.json").write_bytes(content)
    guarded(lambda: read_folder(root))


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(size=st.integers(1, 2**31 - 1), crc=st.booleans())
def test_what_a_gzip_file_says_of_its_own_length_is_not_believed(tmp_path_factory, size: int, crc: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "length.nii.gz"
    good = gzip.compress(nibabel.Nifti1Image(LABELS, np.eye(4)).to_bytes())
    path.write_bytes(
        good[:-8] + (struct.pack("<I", size) + good[-4:] if crc else good[-8:-4] + struct.pack("<I", size))
    )
    volume = guarded(lambda: read_labels(path))
    assert volume is None or path.read_bytes() == good
