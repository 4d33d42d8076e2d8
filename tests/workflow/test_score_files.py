from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.handlers.utils import write_metrics_reports

from monai_iou.files import read_csv
from monai_iou.workflow.score_files import CaseScoresSaver


def saved(folder, files: list[str], scores: torch.Tensor, labels: list[str]) -> None:
    saver = CaseScoresSaver(str(folder), metrics="*", metric_details="*", summary_ops="*", class_labels=labels)
    saver._filenames = files
    saver(SimpleNamespace(state=SimpleNamespace(metrics={"iou": 0.5}, metric_details={"iou": scores})))


def test_files_are_monais_where_monais_are_right(tmp_path):
    scores = torch.rand(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[1, 0] = torch.nan
    files = [f"case{i}.nii.gz" for i in range(5)]
    saved(tmp_path / "ours", files, scores, ["liver", "tumour"])
    (tmp_path / "monai").mkdir()
    write_metrics_reports(
        str(tmp_path / "monai"), files, {"iou": 0.5}, {"iou": scores}, "*", class_labels=["liver", "tumour"]
    )
    means = [float(value) for value in scores.nanmean(0)]
    (row,) = read_csv(tmp_path / "ours" / "metrics.csv")
    assert row == {"metric": "iou", "mean": "0.5", "liver": f"{means[0]:.4f}", "tumour": f"{means[1]:.4f}"}
    for name in ("iou_raw.csv", "iou_summary.csv"):
        assert (tmp_path / "ours" / name).read_text() == (tmp_path / "monai" / name).read_text()


def test_hostile_names_float32_and_equal_labels(tmp_path):
    files = ["a,b.nii.gz", "line\nbreak.nii.gz", "=1+1.nii.gz", "a,b.nii.gz"]
    scores = torch.tensor([[1 / 3, torch.nan]] * 4, dtype=torch.float32)
    saved(tmp_path, files, scores, ["lesion", "lesion"])
    rows = read_csv(tmp_path / "iou_raw.csv")
    assert sorted(row["filename"] for row in rows) == sorted(set(files))
    assert rows[0] == {"filename": rows[0]["filename"], "lesion (1)": "0.3333", "lesion (2)": "nan", "mean": "0.3333"}
    summary = {row["class"]: row for row in read_csv(tmp_path / "iou_summary.csv")}
    assert (summary["lesion (1)"]["mean"], summary["lesion (2)"]["mean"]) == ("0.3333", "nan")
    assert summary["lesion (2)"]["notnans"] == "0.0000"


def test_statistics_by_name(tmp_path):
    saver = CaseScoresSaver(str(tmp_path), metric_details="*", summary_ops=["15percentile", "std"], class_labels=["a"])
    values = np.arange(10.0).reshape(-1, 1)
    saver._filenames = [str(i) for i in range(10)]
    saver(SimpleNamespace(state=SimpleNamespace(metrics={}, metric_details={"iou": values})))
    row = read_csv(tmp_path / "iou_summary.csv")[0]
    assert float(row["15percentile"]) == pytest.approx(np.percentile(values, 15))
    saver.summary_ops = ("best",)
    with pytest.raises(ValueError, match=r"Expected `summary_ops` to be among mean, .* but got best: correct it\."):
        saver(SimpleNamespace(state=SimpleNamespace(metrics={}, metric_details={"iou": values})))
