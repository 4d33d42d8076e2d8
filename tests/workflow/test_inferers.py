"""Flipped views and ensembles: means of probabilities."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from monai.inferers import SlidingWindowInferer

from monai_iou.planning.intensity import shared_intensity
from monai_iou.transforms import NormalizeModalitiesd
from monai_iou.workflow.inferers import Ensemble, MeanProbabilityInferer
from tests.support.pretend_gpu import OnPretendGpu, pretended_gpu

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


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("members", [1, 2])
def test_windows_of_a_gpu_are_joined_on_the_cpu_where_its_memory_is_too_small(flips: bool, members: int) -> None:
    def network(patch: torch.Tensor) -> torch.Tensor:
        return torch.cat([patch, 1 - patch], 1)

    class Members(Ensemble):
        def with_images(self, image: torch.Tensor) -> Any:
            return [(network, image)] * members

    image = torch.randn(1, 1, 6, 6, 6)
    many: Any = network if members == 1 else Members(networks(members), [[{"kind": "zscore"}]] * members)
    arguments: dict[str, Any] = {"roi_size": (4, 4, 4), "overlap": 0.5, "flips": flips}
    expected = MeanProbabilityInferer(**arguments)(image, many)
    with pretended_gpu():
        found = MeanProbabilityInferer(**arguments, device="cpu")(image.cuda(), many)
    assert not isinstance(found, OnPretendGpu)
    torch.testing.assert_close(found, expected)


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


FIRST = {"kind": "ct", "lower": 0.0, "upper": 100.0, "mean": 40.0, "std": 20.0}
SECOND = {"kind": "ct", "lower": -50.0, "upper": 150.0, "mean": 50.0, "std": 40.0}
THIRD = {"kind": "ct", "lower": 20.0, "upper": 90.0, "mean": 60.0, "std": 15.0}


def normalized(image: torch.Tensor, *rules: Any) -> torch.Tensor:
    """Images as the bundle's transform normalises them."""
    return torch.stack([NormalizeModalitiesd("image", rules)({"image": each})["image"] for each in image])


class Seen(torch.nn.Module):
    """A network that keeps the images it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[torch.Tensor] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.images.append(image)
        return torch.cat([image[:, :1], -image[:, -1:]], 1)


@pytest.mark.parametrize("windows", list(itertools.permutations([FIRST, SECOND, THIRD])))
def test_each_model_of_an_ensemble_gets_its_own_ct_normalisation(windows: tuple[dict[str, Any], ...]) -> None:
    # 140 HU is above the first window, and -40 HU below it; the second channel is MR.
    image = torch.empty(1, 2, 5, 5, 5).uniform_(-300, 400)
    image[0, :, 0, 0, 0], image[0, :, 0, 0, 1] = 140, -40
    zscore = {"kind": "zscore"}
    rules = [[window, zscore] for window in windows]
    given = normalized(image, *shared_intensity(rules))
    members = [Seen() for _ in rules]
    ensemble = Ensemble(members, rules)
    # The window is larger than the image: what is added around it is 0 for each model, as in its training.
    padded = MeanProbabilityInferer(roi_size=(8, 8, 8))(given, ensemble)
    ensemble(given)
    expected: Any = 0
    for member, own in zip(members, rules, strict=True):
        alone = normalized(image, *own)
        torch.testing.assert_close(member.images[1], alone)
        (seen,) = member.images[:1]
        assert seen.shape == (1, 2, 8, 8, 8)
        torch.testing.assert_close(seen[:, :, 1:6, 1:6, 1:6], alone)
        assert (seen[:, :, 6:] == 0).all()
        if own[0] is SECOND:
            torch.testing.assert_close(alone[0, 0, 0, 0, :2], torch.tensor([2.25, -2.25]))
        logits = MeanProbabilityInferer(roi_size=(8, 8, 8))(alone, Seen())
        expected = expected + logits.softmax(1) / len(rules)
    torch.testing.assert_close(padded.softmax(1), expected)


def test_models_of_one_normalisation_get_the_images_as_they_are() -> None:
    image, members = torch.randn(1, 1, 4, 4, 4), [Seen(), Seen()]
    Ensemble(members, [[FIRST], [dict(FIRST)]])(image)
    assert all(member.images[0] is image for member in members)
