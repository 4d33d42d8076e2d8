"""Flipped views and ensembles: means of probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from monai.inferers import SlidingWindowInferer

from monai_iou.workflow.inferers import Ensemble, MeanProbabilityInferer

pytestmark = [pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")]


def networks(count: int) -> list[torch.nn.Module]:
    torch.manual_seed(0)
    return [torch.nn.Conv3d(1, 3, 3, padding=1).eval() for _ in range(count)]


def test_flipped_views_are_the_mean_of_eight_windows() -> None:
    image, (network,) = torch.randn(2, 1, 7, 6, 9), networks(1)
    arguments: dict[str, Any] = {"roi_size": (4, 4, 4), "sw_batch_size": 2, "overlap": 0.5, "mode": "gaussian"}
    plain = SlidingWindowInferer(**arguments)
    expected = 0
    for axes in [(), (2,), (3,), (4,), (2, 3), (2, 4), (3, 4), (2, 3, 4)]:
        expected = expected + plain(image.flip(axes), network).softmax(1).flip(axes) / 8
    found = MeanProbabilityInferer(**arguments, flips=True)(image, network)
    torch.testing.assert_close(found.softmax(1), expected)
    assert torch.equal(MeanProbabilityInferer(**arguments)(image, network), plain(image, network))
    # the result does not depend on how the volume lies
    mirrored = MeanProbabilityInferer(**arguments, flips=True)(image.flip(3), network).flip(3)
    torch.testing.assert_close(mirrored, found)


def test_an_ensemble_is_the_mean_of_its_models_probabilities() -> None:
    image, members = torch.randn(1, 1, 6, 6, 6), networks(3)
    ensemble = Ensemble(members, [[{"kind": "zscore"}]] * 3)
    expected = torch.stack([member(image).softmax(1) for member in members]).mean(0)
    torch.testing.assert_close(MeanProbabilityInferer(roi_size=(6, 6, 6))(image, ensemble).softmax(1), expected)
    torch.testing.assert_close(ensemble(image).exp(), expected)


class Constant(torch.nn.Module):
    """The same logits in every voxel, in any type, but others where the image is marked."""

    def __init__(
        self, logits: list[float], marked: list[float] | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.logits, self.marked, self.dtype = logits, marked or logits, dtype

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        maps = [torch.where(image == 9, there, usual) for usual, there in zip(self.logits, self.marked, strict=True)]
        return torch.cat(maps, 1).to(self.dtype)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gap", [104.0, 500.0, 6e4])
def test_models_that_are_sure_have_finite_logits_of_their_mean(sigmoid: bool, dtype: torch.dtype, gap: float) -> None:
    image = torch.zeros(1, 1, 4, 4, 4)
    certain = [torch.tensor(each).view(1, 2, 1, 1, 1) for each in ([1.0, 0.0], [0.0, 1.0])]
    sure = [Constant(logits, dtype=dtype) for logits in ([gap, -gap], [-gap, gap])]
    inferer = MeanProbabilityInferer(roi_size=(4, 4, 4), flips=True, sigmoid=sigmoid)
    rules = [[{"kind": "zscore"}]]
    of_many = Ensemble([sure[0]] * 40 + [sure[1]] * 60, rules * 100, sigmoid)
    mean = 0.4 * certain[0] + 0.6 * certain[1]
    for found, expected in (
        (inferer(image, sure[0]), certain[0]),
        (inferer(image, Ensemble([sure[1]] * 5, rules * 5, sigmoid)), certain[1]),
        (of_many(image), mean),
        (MeanProbabilityInferer(roi_size=(4, 4, 4), sigmoid=sigmoid)(image, of_many), mean),
    ):
        assert found.isfinite().all()
        probabilities = found.sigmoid() if sigmoid else found.softmax(1)
        torch.testing.assert_close(probabilities, expected.expand_as(probabilities), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_output_that_is_not_finite_stays_so_in_a_mean(value: float, sigmoid: bool) -> None:
    image = torch.zeros(1, 1, 4, 4, 4)
    image[0, 0, 1, 2, 3] = 9
    bad = Constant([1.0, 0.0], [1.0, value])
    ensemble = Ensemble([Constant([1.0, 0.0]), bad], [[{"kind": "zscore"}]] * 2, sigmoid)
    for found in (
        MeanProbabilityInferer(roi_size=(4, 4, 4), flips=True, sigmoid=sigmoid)(image, bad),
        MeanProbabilityInferer(roi_size=(4, 4, 4), sigmoid=sigmoid)(image, ensemble),
        ensemble(image),
    ):
        bad_voxels = ~found.isfinite().all(1)
        assert bad_voxels.nonzero().tolist() == [[0, 1, 2, 3]]


def test_a_model_of_another_ct_window_gets_its_own_normalisation() -> None:
    first = {"kind": "ct", "lower": -200.0, "upper": 300.0, "mean": 40.0, "std": 80.0}
    second = {"kind": "ct", "lower": -150.0, "upper": 250.0, "mean": 30.0, "std": 60.0}
    numbers, members = torch.empty(1, 1, 5, 5, 5).uniform_(-200, 300), networks(2)
    given, own = ((numbers.clamp(r["lower"], r["upper"]) - r["mean"]) / r["std"] for r in (first, second))
    found = Ensemble(members, [[first], [second]])(given).exp()
    expected = (members[0](given).softmax(1) + members[1](own).softmax(1)) / 2
    torch.testing.assert_close(found, expected)
