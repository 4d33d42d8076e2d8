"""Vectors for runs of voxels: sums, numbers written and ends of runs against NumPy, at every length and place."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from light_import import LIGHT_IMPORT

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


WRONG = {"lowest_bit": "17", "change_bits": "np.uint64(1 << 31)", "fill": "None", "sum_between": "np.float32(0)"}
SPOIL = f"""
import os, sys, traceback
import numba.core.config
import numpy as np
import torch
{LIGHT_IMPORT}
def spoil(name, wrong, folder):
    numba.core.config.CACHE_DIR = folder
    from monai_iou.voxels import numba_regions, numba_tiles
    setattr(numba_regions, name, numba.njit(eval(f"lambda *_: {{wrong}}", dict(np=np))))
    print(name, numba_tiles.loaded(), sep=": ", flush=True)

for name, wrong in {WRONG}.items():
    child = os.fork()
    if child == 0:
        try:
            spoil(name, wrong, os.path.join(sys.argv[1], name))
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def noticed(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """What is said of each function that does something else, in processes of their own after one import."""
    folder = str(tmp_path_factory.mktemp("machine code"))
    return subprocess.run([sys.executable, "-c", SPOIL, folder], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("spoilt", WRONG)
def test_vectors_that_do_something_else_are_noticed(spoilt: str, noticed: subprocess.CompletedProcess[str]) -> None:
    """As bits in the order of another processor would."""
    assert f"{spoilt}: vectors do not work in Numba here" in noticed.stdout.splitlines(), noticed.stderr


def test_without_regions_all_voxels_are_one_run() -> None:
    none, ends, out = np.empty(0, np.int32), np.zeros(1, np.int64), np.zeros(70 + LANES, np.float32)
    assert numba_regions.run_length(none, 70) == 70
    assert (numba_regions.find_runs(none, 70, ends), ends[0]) == (1, 70)
    numba_regions.read_pulls(np.array([2.5], np.float32), none, 70, out)
    assert (out[:70] == 2.5).all()
