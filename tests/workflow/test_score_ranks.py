"""The files of scores: the same from several ranks as from one process."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from bundle_runs import bundle_command, overrides, run_command, score_rows
from gloo_ranks import join_group, leave_group, run_ranks
from monai.handlers import MeanDice, from_engine

from monai_iou.demo import run_workflow
from monai_iou.handlers import IoUHandler
from monai_iou.workflow.engines import CaseEvaluator
from monai_iou.workflow.score_files import CaseScoresSaver

pytestmark = [pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")]


@pytest.mark.slow
@pytest.mark.parametrize("cases", [pytest.param(3, id="uneven"), pytest.param(1, id="fewer")])
def test_two_ranks_give_the_scores_of_one_process(cases: int, folds: Path, data: Path, tmp_path: Path) -> None:
    content = json.loads((data / "dataset.json").read_text())
    folder = tmp_path / "dataset"
    folder.mkdir()
    for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / part).symlink_to(data / part)
    (folder / "dataset.json").write_text(json.dumps({**content, "test_labelled": content["test_labelled"][:cases]}))
    settings = overrides(folds, folder, ckpt_dir=str(folds / "fold0"))
    run_workflow(folds, ["train", "evaluate"], {**settings, "output_dir": str(tmp_path / "one")})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    configs = ["train", "evaluate", "multi_gpu_evaluate"]
    done = run_command(bundle_command(folds, configs, {**settings, "output_dir": str(tmp_path / "two")}, *launcher))
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("test_mean_iou", "test_mean_dice"):
        one, two = (score_rows(tmp_path / ranks / f"{name}_raw.csv") for ranks in ("one", "two"))
        assert one == two
        assert len(one) == cases
        summaries = [(tmp_path / ranks / f"{name}_summary.csv").read_text() for ranks in ("one", "two")]
        assert summaries[0] == summaries[1]
        assert summaries[0].splitlines()[1].startswith("lesion,")
    means = [(tmp_path / ranks / "metrics.csv").read_text().split() for ranks in ("one", "two")]
    one, two = ({name: float(value) for name, value, *_ in (line.split(",") for line in lines[1:])} for lines in means)
    assert one == pytest.approx(two, rel=1e-6)


# For each of two ranks the cases that it evaluates; those with NaN fail. A name may hold what parts names elsewhere.
FAILING: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "second": ({"a": 1.0, "b\tb": 0.0}, {"c": math.nan}),
    "first": ({"a": math.nan}, {"b": 1.0, "c": 0.0}),
    "one of each": ({"a": math.nan, "b": 1.0}, {"c": 0.0, "d": math.nan}),
    "both": ({"a": math.nan}, {"b": math.nan}),
}


def evaluate(cases: dict[str, float], folder: Path, *, metric_of_monai: bool = False) -> int:
    """Evaluate volumes whose output is the image; return the number of those that fail."""
    label = torch.zeros(1, 1, 4, 4, 4)
    label[..., :2] = 1
    batches = []
    for name, value in cases.items():
        image = torch.zeros_like(label)
        image[..., 0] = value
        batches.append({"image": image, "label": label, "case": [name]})
    pair = from_engine(["pred", "label"])
    engine = CaseEvaluator(
        device=torch.device("cpu"),
        val_data_loader=batches,
        epoch_length=len(batches),
        network=torch.nn.Identity(),
        key_val_metric={"iou": IoUHandler(include_background=False, num_classes=2, output_transform=pair)},
        additional_metrics={"dice": MeanDice(output_transform=pair)} if metric_of_monai else None,
        val_handlers=[
            CaseScoresSaver(
                str(folder),
                metric_details="*",
                batch_transform=lambda batch: [{"filename_or_obj": item["case"]} for item in batch],
                summary_ops="*",
                class_labels=["lesion"],
            )
        ],
    )
    engine.run()
    return len(engine.state.failed_cases)


def evaluate_share(rank: int, folder: str) -> None:
    join_group(rank, 2, folder)
    failed = {}
    for name, shares in FAILING.items():
        failed[name] = evaluate(shares[rank], Path(folder) / "two" / name)
    # MONAI's metrics would wait for the rank without scores: then there are none, but the command ends.
    failed["monai"] = evaluate(FAILING["second"][rank], Path(folder) / "two" / "monai", metric_of_monai=True)
    torch.save(failed, Path(folder) / f"{rank}.pt")
    leave_group()


def test_scores_are_written_where_all_cases_of_one_rank_fail(tmp_path: Path) -> None:
    run_ranks(evaluate_share, 2, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, shares in FAILING.items():
        one, two = (tmp_path / ranks / name for ranks in ("one", "two"))
        joined = {**shares[0], **shares[1]}
        finished = [case for case, value in joined.items() if not math.isnan(value)]
        assert evaluate(joined, one) == first[name] + second[name] == len(joined) - len(finished)
        assert one.is_dir() == two.is_dir() == bool(finished)
        if finished:
            assert list(score_rows(two / "iou_raw.csv")) == finished
            texts = [{path.name: path.read_text() for path in folder.iterdir()} for folder in (one, two)]
            assert texts[0] == texts[1]
            assert set(texts[0]) == {"metrics.csv", "iou_raw.csv", "iou_summary.csv"}
    assert (first["monai"], second["monai"]) == (0, 1)
    assert not (tmp_path / "two" / "monai").exists()


def test_columns_without_a_name_are_refused() -> None:
    saver = CaseScoresSaver("out", class_labels=["a,b"], metric_details="*")
    assert saver.class_labels == ["a,b"]
    for shape, message in (
        (
            (3, 2),
            "Expected `class_labels` to be 2 names, one for each class of iou, but got ['a,b']: name each class once.",
        ),
        (
            (3,),
            "Expected iou to be a table with a column for each class, but got shape (3,): leave this metric out of ",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            saver._checked("iou", torch.zeros(shape))
