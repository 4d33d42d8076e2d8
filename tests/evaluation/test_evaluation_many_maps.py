"""Probability maps of very many cases, and of more memory than there is."""

from __future__ import annotations

import io
import re
import tracemalloc
import zipfile
from collections.abc import ItemsView
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from monai_iou.evaluation import map_files, probabilities
from monai_iou.evaluation.evaluate import evaluate_folders
from monai_iou.evaluation.map_files import find_maps
from monai_iou.evaluation.pairing import PairingError
from monai_iou.evaluation.probabilities import OPERATING_POINTS, RESOLUTION
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
    monkeypatch.setattr(map_files, "find_volumes", lambda *_, **__: files)
    found = find_maps(tmp_path, cases)
    assert files.times <= 2
    assert found == {case: {label: Path(f"{case}_{label}") for label in ("10", "9", "whole_a")} for case in cases}
    assert [list(parts) for parts in found.values()] == [["10", "9", "whole_a"]] * 50


def touched(folder: Path, names: tuple[str, ...]) -> dict[str, Path]:
    paths = {name: folder / f"{name}.nii.gz" for name in names}
    for path in paths.values():
        path.touch()
    return paths


def test_a_file_is_of_the_longest_case_that_it_names(tmp_path: Path) -> None:
    paths = touched(tmp_path, ("a_b_1", "a_b_2", "a_1", "a_b_c"))
    assert find_maps(tmp_path, ["a", "a_b", "x"]) == {
        "a": {"1": paths["a_1"]},
        "a_b": {"1": paths["a_b_1"], "2": paths["a_b_2"], "c": paths["a_b_c"]},
    }


@pytest.mark.parametrize("values", [("1",), ("1", "2")])
def test_a_case_that_is_called_as_a_structure_of_another_has_maps_of_its_own(
    values: tuple[str, ...], tmp_path: Path
) -> None:
    """Label 1 of `p`, label 1 of `p_1` and so on; and of `p_1_1`, which has no masks of its own name."""
    cases = ["p", "p_1", "p_1_1"]
    expected = {case: {value: tmp_path / f"{case}_{value}.nii.gz" for value in values} for case in cases}
    touched(tmp_path, tuple(f"{case}_{value}" for case in cases for value in values))
    assert find_maps(tmp_path, cases) == expected
    touched(tmp_path, ("p",))
    assert find_maps(tmp_path, cases) == expected, "the mask beside the maps is none"


def test_whole_maps_of_cases_that_are_called_as_structures_are_whole(tmp_path: Path) -> None:
    cases = ["p", "p_1", "q"]
    paths = touched(tmp_path, ("p", "p_1", "q", "p_mask", "p_1_mask"))
    assert find_maps(tmp_path, cases) == {case: {"": paths[case]} for case in cases}
    paths["p"].unlink()
    (tmp_path / "p_mask.nii.gz").unlink()
    assert find_maps(tmp_path, cases) == {case: {"": paths[case]} for case in ("p_1", "q")}, "all are whole"


@pytest.mark.parametrize("others", [(), ("p_2",), ("q_1",), ("p_2", "p_2_1", "p_2_2"), ("q", "q_1")])
def test_a_file_that_may_be_of_two_cases_is_refused(others: tuple[str, ...], tmp_path: Path) -> None:
    """Of `p_1` there is nothing else: the file is the map of it, or of the structure 1 of `p`."""
    touched(tmp_path, ("p_1", *others))
    message = (
        f"Expected the name of `{tmp_path / 'p_1.nii.gz'}` to say whose map it is, but got that of the case p_1 and of "
        "the structure 1 of the case p: name the maps of whole cases CASE_probabilities, or add those of the "
        "structures of p_1."
    )
    with pytest.raises(PairingError, match=f"^{re.escape(message)}$"):
        find_maps(tmp_path, ["p", "p_1", "p_2", "q"])


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


@pytest.mark.usefixtures("forked_workers")
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
    reference = Volume(np.zeros((5, 4, 3), np.uint8), Grid((5, 4, 3), np.eye(4)), path)
    return probabilities._archive(path, reference)


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
