"""The metrics under real ranks: a rank without data neither hangs nor fails, and uneven rows arrive in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_ranks import join_group, leave_group, run_ranks
from ignite.engine import Engine

from monai_iou.handlers import CalibrationHandler, ThresholdIoUHandler
from monai_iou.metrics import BoundaryIoUMetric, CalibrationMetric, IoUMetric, LesionIoUMetric, ThresholdIoUMetric
from monai_iou.voxels.probability_bins import probability_histograms

IMAGES = torch.randint(0, 3, (5, 2, 1, 6, 6), generator=torch.Generator().manual_seed(7))
LABELLED = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1], [1, 0, 0], [1, 1, 1]]).bool()


def make_metrics() -> dict[str, Any]:
    return {
        "iou": IoUMetric(False, "mean_batch", num_classes=3),
        "lesions": LesionIoUMetric(num_classes=3),
        "boundary": BoundaryIoUMetric(num_classes=3),
    }


def score(metrics: dict[str, Any], images: list[int], *, partly: bool) -> None:
    for metric in metrics.values():
        for index in images:
            labelled = LABELLED[[index]] if partly else None
            metric(IMAGES[index, :1], IMAGES[index, 1:], labelled=labelled)


def collected(metric: Any, *, empty: bool) -> dict[str, Any]:
    """Return everything that a metric collects over the ranks; of no image at all there is no summary."""
    means = [metric.aggregate(reduction) for reduction in (None, "mean", "mean_batch", "sum_batch")]
    summary = metric.summary() if hasattr(metric, "summary") and not empty else None
    return {"means": means, "buffer": metric.get_buffer(), "length": len(metric), "summary": summary}


# All rounds on one set of ranks: starting processes is nearly all the time that this takes.
SHARES = [[[0, 1, 2], [3], []], [[], [4, 2], []], [[], [], []], [[1, 3], [], []], [[0], [], [2, 4]]]
ROUNDS = [(shares, partly) for shares in SHARES for partly in (False, True)]
WORLD = 3


def score_shares(rank: int, folder: str) -> None:
    """One rank: in each round score its images, then everything that collects over the ranks."""
    join_group(rank, WORLD, folder)
    metrics = make_metrics()
    results = []
    for shares, partly in ROUNDS:
        score(metrics, shares[rank], partly=partly)
        with torch.device("meta" if partly else "cpu"):  # no default device takes part
            results.append({name: collected(metric, empty=not any(shares)) for name, metric in metrics.items()})
        for metric in metrics.values():
            metric.reset()
    torch.save(results, Path(folder) / f"{rank}.pt")
    leave_group()


def test_ranks_equal_one_process(tmp_path: Path) -> None:
    run_ranks(score_shares, WORLD, str(tmp_path))
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for round_, (shares, partly) in enumerate(ROUNDS):
        alone = make_metrics()
        images = [index for share in shares for index in share]
        score(alone, images, partly=partly)
        for name, metric in alone.items():
            expected = collected(metric, empty=not images)
            assert expected["length"] == len(images)
            for result in results:
                found = result[round_][name]
                for part in ("means", "buffer"):
                    torch.testing.assert_close(found[part], expected[part], equal_nan=True)
                assert found["length"] == expected["length"]
                assert repr(found["summary"]) == repr(expected["summary"])  # NaN included
                assert images or found["means"][0].isnan().all()


def test_what_was_not_annotated_counts_nowhere() -> None:
    metrics = make_metrics()
    images = [0, 3, 1]
    score(metrics, images, partly=True)
    for metric in metrics.values():
        assert torch.equal(metric.get_buffer().isnan(), ~LABELLED[images, 1:])
        sums, counts = metric.aggregate("sum_batch"), LABELLED[images, 1:].sum(0)
        torch.testing.assert_close(metric.aggregate("mean_batch"), sums / counts)
    assert [row["images"] for row in metrics["lesions"].summary()] == [1, 1]
    first = IoUMetric(False, num_classes=3)
    first(IMAGES[0, :1], IMAGES[0, 1:])
    pooled = metrics["iou"].summary()["iou_d_per_class"][0]  # class 1 is known in the first image alone
    assert pooled == pytest.approx(first.summary()["iou_d_per_class"][0])


REGIONS = torch.zeros(1, 3, 12, 12)  # whole, core and rim, which overlap
REGIONS[:, 0, 2:10, 2:10] = REGIONS[:, 1, 3:8, 3:8] = REGIONS[:, 2, 4:6, 4:6] = 1
ONE_HOT = torch.cat([1 - REGIONS[:, :1], REGIONS[:, :1] - REGIONS[:, 1:2], REGIONS[:, 1:2]], 1)
NAMED: dict[str, Any] = {"reduction": "mean_batch", "return_with_label": True}
OF_MAPS: tuple[Any, ...] = (BoundaryIoUMetric, LesionIoUMetric, ThresholdIoUMetric, CalibrationMetric)


def named_scores(*, has_images: bool) -> list[dict[str, float]]:
    metrics = [(make(**NAMED), maps) for maps in (REGIONS, ONE_HOT) for make in OF_MAPS]
    for metric, maps in metrics:
        if has_images:
            metric(maps, maps)
    return [metric.aggregate() for metric, _ in metrics]


def name_scores(rank: int, folder: str) -> None:
    join_group(rank, 2, folder)
    results = named_scores(has_images=rank == 1)
    mixed = ThresholdIoUMetric(**NAMED)
    if rank == 1:
        mixed(REGIONS, REGIONS)
    else:
        mixed.add_histograms(probability_histograms(REGIONS, REGIONS, activation=None, resolution=200).counts)
    torch.save([*results, mixed.aggregate()], Path(folder) / f"{rank}.pt")
    leave_group()


def test_scores_have_the_same_names_on_a_rank_without_images(tmp_path: Path) -> None:
    """Only an image tells whether class 0 is a background, which decides what the first score is the score of."""
    run_ranks(name_scores, 2, str(tmp_path))
    expected = named_scores(has_images=True)
    assert [next(iter(scores)) for scores in expected] == ["label_0"] * 4 + ["label_1"] * 4
    for rank in range(2):
        *found, mixed = torch.load(tmp_path / f"{rank}.pt")
        for theirs, ours in zip(found, expected, strict=True):
            assert list(theirs) == list(ours)
            assert list(theirs.values()) == pytest.approx(list(ours.values()), nan_ok=True)
        assert mixed == {"label_0": 1.0, "label_1": 1.0, "label_2": 1.0}


def score_other_classes(rank: int, folder: str) -> None:
    join_group(rank, 2, folder)
    metric, messages = IoUMetric(), []
    metric(torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    if rank == 0:
        metric(torch.ones(1, 3, 4), torch.ones(1, 3, 4))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the texts are compared below
        metric.aggregate()
    messages.append(str(caught.value))
    metric.reset()
    metric(torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    torch.save([*messages, metric.aggregate().item()], Path(folder) / f"{rank}.pt")  # the ranks are still together
    leave_group()


def test_images_of_other_classes_on_one_rank_are_told_by_all(tmp_path: Path) -> None:
    run_ranks(score_other_classes, 2, str(tmp_path))
    told = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert told[0][0].startswith("Expected every image to have the same classes, but got [2, 3] of them: set ")
    assert told[1][0] == "Expected the scores of every rank, but got an error on rank 0: see its message."
    assert [values[-1] for values in told] == [1.0, 1.0]


COLLECTING: dict[str, tuple[Any, Any]] = {
    "get_buffer": (LesionIoUMetric, lambda metric: metric.get_buffer()),
    "summary": (IoUMetric, lambda metric: metric.summary()),
    "get_counts": (IoUMetric, lambda metric: list(metric.get_counts())),
    "curves": (ThresholdIoUMetric, lambda metric: metric.curves().iou),
    "reliability": (CalibrationMetric, lambda metric: metric.reliability().counts),
}
FIRST = torch.tensor([[[1, 1, 0, 0, 1, 0]]]), torch.tensor([[[1, 0, 0, 0, 1, 0]]])
MORE = torch.tensor([[[0, 1, 1, 0, 1, 0]]]), torch.tensor([[[1, 1, 1, 0, 1, 1]]])


def score_on(metric: Any, *pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    for prediction, reference in pairs:
        metric(prediction.float(), reference.float())


def collect_again(rank: int, folder: str) -> None:
    """Score an image on both ranks and collect; then one more on rank 0 alone, and collect again without a reset."""
    join_group(rank, 2, folder)
    results = []
    for make, collect in COLLECTING.values():
        metric = make()
        score_on(metric, FIRST)
        once = collect(metric)
        score_on(metric, *[MORE] * (rank == 0))
        metric.aggregate()
        # Rank 1 does not ask, and rank 0 waits for nobody: what has been collected is read again on one rank alone.
        again, length = (collect(metric), len(metric)) if rank == 0 else (None, None)
        results.append((once, again, length))
    for handler in (ThresholdIoUHandler(), CalibrationHandler()):
        handler.attach(Engine(lambda _, batch: batch), "score")
        handler.update(tuple(map(torch.Tensor.float, FIRST)))
        handler.compute()
        if rank == 0:
            handler.update(tuple(map(torch.Tensor.float, MORE)))
        handler.compute()
        results.append(len(handler.metric))
    torch.save(results, Path(folder) / f"{rank}.pt")
    leave_group()


def test_images_of_one_rank_after_a_first_look_are_collected_from_all(tmp_path: Path) -> None:
    """The other rank had no new image, and answered from what it had: the first one waited for it for ever."""
    run_ranks(collect_again, 2, str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for place, (make, collect) in enumerate(COLLECTING.values()):
        first, both = make(), make()
        score_on(first, FIRST, FIRST)
        score_on(both, FIRST, MORE, FIRST)  # in the order of the ranks
        for rank in range(2):
            once, again, length = found[rank][place]
            assert repr(once) == repr(collect(first))  # NaN included
            assert repr(again) == (repr(collect(both)) if rank == 0 else "None")
            assert length == (3 if rank == 0 else None)
    assert [rank_found[len(COLLECTING) :] for rank_found in found] == [[3, 3]] * 2
