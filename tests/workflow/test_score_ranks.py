"""The files of scores: the same from several ranks as from one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from bundle_runs import bundle_command, overrides, run_command, score_rows

from monai_iou.demo import run_workflow
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


def test_columns_without_a_name_are_refused() -> None:
    saver = CaseScoresSaver("out", class_labels=["a,b"], metric_details="*")
    assert saver.class_labels == ["a,b"]
    with pytest.raises(ValueError, match=r"Expected `class_labels` to name the \(2,\) classes of iou"):
        saver._checked("iou", torch.zeros(3, 2))
