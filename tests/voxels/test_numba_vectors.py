"""Vectors for runs of voxels: sums, numbers written and ends of runs against NumPy, at every length and place."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monai_iou.voxels import numba_regions, numba_vectors
from monai_iou.voxels.numba_math import PADDING, WIDTH, loop
from monai_iou.voxels.numba_vectors import COMPARED, LANES


@loop
def sum_between(values: Any, start: int, stop: int) -> Any:
    return numba_vectors.sum_between(values, start, stop)


@loop
def fill(values: Any, start: int, stop: int, number: Any) -> None:
    numba_vectors.fill(values, start, stop, number)


def test_rows_have_room_for_the_last_vector() -> None:
    assert PADDING >= LANES


@pytest.mark.parametrize("start", [0, 1, LANES - 1, LANES, 37])
def test_a_sum_has_the_values_between_two_places_alone(start: int) -> None:
    values = np.random.default_rng(start).normal(size=37 + 5 * LANES).astype(np.float32)
    for stop in range(start, 37 + 4 * LANES + 1):
        others = np.where(
            (np.arange(values.size) < start) | (np.arange(values.size) >= stop), np.float32("nan"), values
        )
        exact = values[start:stop].astype(np.float64).sum()
        assert sum_between(others, start, stop) == pytest.approx(exact, abs=1e-5)


def test_infinite_and_missing_numbers_stay_what_they_are() -> None:
    for special in ("inf", "-inf", "nan"):
        values = np.ones(5 * LANES, np.float32)
        values[LANES + 3] = special
        np.testing.assert_equal(sum_between(values, 2, 3 * LANES + 1), np.float32(special))


@pytest.mark.parametrize("start", [0, 1, LANES - 1, LANES, 37])
def test_what_is_written_ends_with_the_last_vector(start: int) -> None:
    for stop in range(start, 37 + 4 * LANES + 1):
        values = np.zeros(37 + 5 * LANES, np.float32)
        fill(values, start, stop, np.float32(3))
        assert (values[start:stop] == 3).all()
        assert not values[:start].any()
        assert not values[start + -(-(stop - start) // LANES) * LANES :].any()


@pytest.mark.parametrize("length", [1, 2, COMPARED, COMPARED + 1, 2 * COMPARED + 1, 500, WIDTH])
@pytest.mark.parametrize("longest", [1, 3, 40, 2000])
def test_runs_end_where_numpy_sees_a_change(length: int, longest: int) -> None:
    """The voxels behind the row are of other regions, and the last vector may not read them."""
    generator = np.random.default_rng(length + longest)
    regions = np.repeat(generator.permutation(length), generator.integers(1, longest + 1, length))[:length]
    groups = np.concatenate([regions, -1 - np.arange(3)]).astype(np.int32)
    changes = [*(np.flatnonzero(np.diff(regions)) + 1), length]
    for row in (groups, groups[:length]):  # within a tile, and at its end
        ends = np.zeros(length, np.int64)
        runs = numba_regions.find_runs(row, length, ends)
        assert ends[:runs].tolist() == changes
        for start, end in pairwise([0, *changes]):
            assert numba_regions.run_length(row[start:], length - start) == end - start
    pulls = generator.normal(size=length).astype(np.float32)
    out = np.zeros(length + LANES, np.float32)
    numba_regions.read_pulls(pulls, groups[:length], length, out)
    np.testing.assert_array_equal(out[:length], pulls[regions])


@pytest.mark.parametrize("spoilt", ["lowest_bit", "change_bits", "fill", "sum_between"])
def test_vectors_that_do_something_else_are_noticed(spoilt: str, tmp_path: Path) -> None:
    """As bits in the order of another processor would."""
    wrong = {"lowest_bit": "17", "change_bits": "np.uint64(1 << 31)", "fill": "None", "sum_between": "np.float32(0)"}
    code = f"""if True:
        import numpy as np
        from numba import njit
        from monai_iou.voxels import numba_regions, numba_tiles
        numba_regions.{spoilt} = njit(eval("lambda *_: {wrong[spoilt]}", dict(np=np)))
        assert numba_tiles.loaded() == "vectors do not work in Numba here", numba_tiles.loaded()
        """
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_regions_all_voxels_are_one_run() -> None:
    none, ends, out = np.empty(0, np.int32), np.zeros(1, np.int64), np.zeros(70 + LANES, np.float32)
    assert numba_regions.run_length(none, 70) == 70
    assert (numba_regions.find_runs(none, 70, ends), ends[0]) == (1, 70)
    numba_regions.read_pulls(np.array([2.5], np.float32), none, 70, out)
    assert (out[:70] == 2.5).all()
