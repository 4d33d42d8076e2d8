"""Every study runs from its first to its last choice: `--quick`, as a user types it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from places import DATA as REAL

from benchmarks.evidence import __main__ as command
from benchmarks.evidence.data import DATA
from benchmarks.evidence.report import table
from benchmarks.evidence.studies import STUDIES, Study
from benchmarks.evidence.tables import cases_of, runs_of

NEED_NNUNET = "nnU-Net"  # the choices whose names start so


def reads_real_data(study: Study) -> bool:
    return any(DATA[run.data].builder != "phantoms" for run in study.runs(quick=True))


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_quick_runs_have_every_loss_and_every_sampler(study: Study) -> None:
    runs = study.runs(quick=True)
    assert len(set(runs)) == len(runs) < 20
    assert {run.loss for run in runs} == {loss for loss, _ in study.choices} >= set(study.losses)
    assert {run.sampler for run in runs} == {sampler for _, sampler in study.choices} >= set(study.samplers)


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_every_study_runs(study: Study, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if reads_real_data(study) and not REAL.is_dir():
        pytest.skip(f"needs {REAL}")
    has_nnunet = importlib.util.find_spec("nnunetv2") is not None
    losses = {loss for loss, _ in study.choices if has_nnunet or not loss.startswith(NEED_NNUNET)}
    code = command.main(["--study", study.name, "--quick", "--output", str(tmp_path), "--only", *losses])
    assert code == 0, capfd.readouterr().out + "".join(path.read_text()[-2000:] for path in tmp_path.rglob("*.log"))
    expected = [run for run in study.runs(quick=True) if run.loss in losses]
    assert len(runs_of(tmp_path, study.name)) == len(expected)
    assert {row["loss"] for row in cases_of(tmp_path, study.name)} == losses
    for loss in losses if set(study.quick.get("data", study.data)) <= set(study.data) else ():
        assert f"| {loss} |" in table(study, tmp_path)
