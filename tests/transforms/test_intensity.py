"""What NormalizeModalitiesd refuses when it is made: a wrong rule would train on wrong intensities without a word."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from monai_iou.transforms import NormalizeModalitiesd

CT = {"kind": "ct", "lower": -100, "upper": 300.0, "mean": 50.0, "std": 20.0}
LIST = 'list one dictionary per channel, such as [{"kind": "zscore"}].'
KINDS = "to be one of 'ct', 'zscore', 'none', but got {}: choose one of these."
RANGE = (
    "Expected `intensity[0]` to have lower <= upper, and a finite mean and std > 0, but got lower={}, upper=300.0, "
    "mean={}, std={}: give those of the foreground of the training data."
)


@pytest.mark.parametrize(
    ("intensity", "kind", "message"),
    [
        ([{**CT, "kind": "CT"}], ValueError, f'Expected `intensity[0]["kind"]` {KINDS.format(repr("CT"))}'),
        ([CT, {"kind": "mr"}], ValueError, f'Expected `intensity[1]["kind"]` {KINDS.format(repr("mr"))}'),
        ([{"lower": 0}], ValueError, f'Expected `intensity[0]["kind"]` {KINDS.format(None)}'),
        (
            [{"kind": "ct", "lower": 0, "mean": 1}],
            ValueError,
            "Expected `intensity[0]` to have lower, upper, mean, std, but got no upper and no std: give the statistics "
            "of the foreground of the training data.",
        ),
        (
            [{**CT, "mean": "50"}],
            TypeError,
            'Expected `intensity[0]["mean"]` to be a number, but got str: pass an int or a float.',
        ),
        ([{**CT, "std": 0}], ValueError, RANGE.format("-100.0", "50.0", "0.0")),
        ([{**CT, "lower": 400}], ValueError, RANGE.format("400.0", "50.0", "20.0")),
        ([{**CT, "mean": float("nan")}], ValueError, RANGE.format("-100.0", "nan", "20.0")),
        ({"kind": "zscore"}, TypeError, f"Expected `intensity` to be a list, but got dict: {LIST}"),
        ("zscore", TypeError, f"Expected `intensity` to be a list, but got str: {LIST}"),
        (["zscore"], TypeError, f"Expected `intensity[0]` to be a dictionary, but got 'zscore': {LIST}"),
        ([], ValueError, f"Expected `intensity` to hold at least one channel, but got none: {LIST}"),
    ],
)
def test_what_normalises_nothing_is_refused(intensity: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        NormalizeModalitiesd("image", intensity)


def test_infinite_bounds_clip_nothing() -> None:
    image = torch.tensor([[-1e6, 50.0, 1e6]])
    rule = {**CT, "lower": -math.inf, "upper": math.inf}
    found = NormalizeModalitiesd("image", [rule])({"image": image})["image"]
    torch.testing.assert_close(found, (image - 50) / 20)


def test_all_kinds_are_taken_and_left_as_they_were() -> None:
    rules = [dict(CT), {"kind": "zscore"}, {"kind": "none"}]
    image = torch.tensor([-200.0, 50.0, 70.0]).expand(3, 1, 3)
    result = NormalizeModalitiesd("image", rules)({"image": image})["image"]
    assert rules == [CT, {"kind": "zscore"}, {"kind": "none"}]
    torch.testing.assert_close(result[0, 0], torch.tensor([-7.5, 0.0, 1.0]))
    assert torch.equal(result[2], image[2])
