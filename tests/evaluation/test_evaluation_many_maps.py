"""Probability maps of very many cases, and of more memory than there is."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from collections.abc import ItemsView
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from monai_iou.evaluation import probabilities
from monai_iou.evaluation.evaluate import evaluate_folders
from monai_iou.evaluation.probabilities import OPERATING_POINTS, RESOLUTION, find_maps
from monai_iou.evaluation.request import Request
from monai_iou.evaluation.thresholds import sparse, summarise_maps
from monai_iou.volumes import memory
from monai_iou.volumes.grid import Grid
from monai_iou.volumes.reading import Volume, VolumeError

DENSE = 2 * (RESOLUTION + 1) * 8  # bytes of a histogram


class Counted(dict[str, Path]):
    """Volumes that count how often somebody goes through all of them."""

    times = 0

    def items(self) -> ItemsView[str, Path]:
        self.times += 1
        return super().items()


def test_the_files_are_gone_through_once_however_many_cases_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [f"site_{i // 10}/case_{i}" for i in range(50)]
    files = Counted({f"{case}_{label}": Path(f"{case}_{label}") for case in cases for label in ("10", "9", "whole_a")})
    monkeypatch.setattr(probabilities, "find_volumes", lambda *_, **__: files)
    found = find_maps(tmp_path, cases)
    assert files.times <= 2
    assert found == {case: {label: Path(f"{case}_{label}") for label in ("10", "9", "whole_a")} for case in cases}
    assert [list(parts) for parts in found.values()] == [["10", "9", "whole_a"]] * 50


def test_a_file_may_be_of_a_structure_of_two_cases_and_is_of_none_where_it_is_a_case(tmp_path: Path) -> None:
    for name in ("a_b_1", "a_b_2", "a_1", "a_b_c"):
        (tmp_path / f"{name}.nii.gz").touch()
    paths = {name: tmp_path / f"{name}.nii.gz" for name in ("a_b_1", "a_b_2", "a_1", "a_b_c")}
    assert find_maps(tmp_path, ["a", "a_b", "x"]) == {
        "a": {"1": paths["a_1"], "b_1": paths["a_b_1"], "b_2": paths["a_b_2"], "b_c": paths["a_b_c"]},
        "a_b": {"1": paths["a_b_1"], "2": paths["a_b_2"], "c": paths["a_b_c"]},
    }
    assert find_maps(tmp_path, ["a", "a_b_c"]) == {
        "a": {"1": paths["a_1"], "b_1": paths["a_b_1"], "b_2": paths["a_b_2"]},
        "a_b_c": {"": paths["a_b_c"]},
    }


def test_histograms_of_many_cases_are_never_all_dense() -> None:
    """Those of 20,000 cases would take 1.3 GB."""
    histogram = np.zeros((2, RESOLUTION + 1), np.int64)
    histogram[:, [0, 3, RESOLUTION]] = [[900, 5, 2], [1, 3, 80]]
    case = {"1": {"histogram": sparse(histogram), "lesions": [[1, 0, 0]] * len(OPERATING_POINTS)}}
    summarise_maps([case], "1")
    tracemalloc.start()
    try:
        found = summarise_maps([case] * 300, "1")
        assert tracemalloc.get_traced_memory()[1] < 300 * DENSE / 4
    finally:
        tracemalloc.stop()
    assert found["cases"] == 300
    assert found["iou_at_half"] == pytest.approx(80 / 86)
    assert sum(found["reliability"]["counts"][0:1]) == 300 * 909


def test_what_an_evaluation_keeps_of_maps_is_sparse(tmp_path: Path) -> None:
    label = np.zeros((8, 8, 4), np.uint8)
    label[2:5, 2:5, 1:3] = 1
    sure = np.where(label, 0.9, 0.05).astype(np.float32)
    for kind, array in (("references", label), ("predictions", label), ("maps", np.stack([1 - sure, sure], -1))):
        (tmp_path / kind).mkdir()
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / kind / "a.nii")
    folders = (tmp_path / "predictions", tmp_path / "references", tmp_path / "out")
    request = Request(*folders, probabilities=tmp_path / "maps")
    fresh, again = evaluate_folders(request), evaluate_folders(request)
    assert again.reused == 1
    assert fresh.summary["probabilities"] == again.summary["probabilities"]
    for done in (fresh, again, evaluate_folders(replace(request, output=tmp_path / "workers", workers=2))):
        rows = done.maps["a"]["1"]["histogram"]
        assert sum(part.nbytes for row in rows for part in row) < DENSE / 1000


def header_of(shape: tuple[int, ...], dtype: str) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def read(path: Path) -> np.ndarray:
    grid = Grid((5, 4, 3), np.eye(4))
    return probabilities._archive(path, Volume(np.zeros((5, 4, 3), np.uint8), grid, path))


def test_an_archive_that_asks_for_more_memory_than_there_is_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("probabilities.npy", header_of((3, 90_000, 90_000, 90_000), "<f4"))
    with pytest.raises(
        VolumeError, match=r"Expected `.*a.npz` to fit into the free memory, but got .* GiB for shape 3x9"
    ):
        read(path)


@pytest.mark.parametrize(("dtype", "each"), [("float32", 4), ("float16", 6), ("float64", 12)])
def test_an_archive_needs_memory_for_its_values_and_for_those_in_float32(
    dtype: str, each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, needed = tmp_path / "a.npz", 2 * 3 * 4 * 5 * each
    np.savez_compressed(path, probabilities=np.full((2, 3, 4, 5), 0.5, dtype))
    monkeypatch.setattr(memory, "RESERVE", 0)
    monkeypatch.setattr(memory, "free_memory", lambda: needed)
    found = read(path)
    assert found.shape == (2, 5, 4, 3)
    assert (found == 0.5).all()
    monkeypatch.setattr(memory, "free_memory", lambda: needed - 1)
    with pytest.raises(VolumeError, match="to fit into the free memory"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x93NUMPY\x01\x00"])
def test_what_is_no_archive_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"Expected `.*a.npz` to be an archive of probabilities, but got .*: write it"):
        read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("probabilities.npy", content)
    with pytest.raises(ValueError, match=r"Expected `.*a.npz` to be an archive of probabilities, but got .*: write it"):
        read(path)
