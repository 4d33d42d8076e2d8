"""`monai-iou plan --minutes`: a training that ends in time, and what it gives up for that."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_iou.cli import main
from monai_iou.commands.plan import write_plan
from monai_iou.datasets.cases import DatasetError
from monai_iou.datasets.folder import SegmentationFolder, read_folder
from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.planning.fingerprint import Fingerprint, compute_fingerprint
from monai_iou.planning.hardware import GIB, Machine, detect_hardware
from monai_iou.planning.minutes import FEW_PASSES, FULL_RESOLUTION_STEPS, RESERVE, propose_within
from monai_iou.planning.plan import Plan, make_plan
from monai_iou.planning.rules import Proposal, propose
from monai_iou.planning.timing import Timing, _parser, measure_timing

CPU = Machine("cpu", 8 * GIB, 8 * GIB, "16 GiB of RAM free")
Measured = tuple[SegmentationFolder, Fingerprint]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """A folder of five small volumes, whose plan has a first level of full resolution."""
    root = tmp_path_factory.mktemp("small")
    folder = read_folder(write_phantom_dataset(root / "set", training=5, evaluation=0, shape=(24, 24, 20)))
    return folder, compute_fingerprint(folder)


def within(minutes: float, measured: Measured, full: Timing, strided: Timing | None = None) -> Proposal:
    def measure(_: SegmentationFolder, plan: Plan, keys: Mapping[str, Any], machine: Machine) -> Timing:
        return full if keys["full_resolution"] or strided is None else strided

    return propose_within(minutes, *measured, CPU, measure=measure)


def duration(proposal: Proposal, timing: Timing, cases: int = 5, held_out: int = 2) -> tuple[int, float]:
    """The steps and the seconds of a training, counted from its keys as the bundle runs them."""
    keys = proposal.config
    seconds, steps = timing.start + cases * timing.case, 0
    for epoch in range(1, keys["epochs"] + 1):
        for _ in range((cases - held_out) * keys["case_repeats"] // keys["batch_size"]):
            seconds, steps = seconds + timing.step, steps + 1
        if epoch % keys["val_interval"] == 0:
            seconds += held_out * timing.validation
    return steps, seconds


@pytest.mark.parametrize("seed", range(40))
def test_a_training_ends_in_time_and_uses_it(measured: Measured, seed: int) -> None:
    rng = np.random.default_rng(seed)
    minutes = float(np.exp(rng.uniform(np.log(0.5), np.log(600))))
    timing = Timing(*(float(rng.uniform(low, high)) for low, high in ((0, 20), (0, 1), (0.01, 0.3), (0, 3))))
    try:
        found = within(minutes, measured, timing)
    except ValueError:
        assert 60 * minutes * (1 - RESERVE) < timing.start + 5 * timing.case + 2 * timing.validation + 21 * timing.step
        return
    steps, seconds = duration(found, timing)
    assert seconds <= 60 * minutes
    longest, _ = duration(propose(*measured, CPU), timing)
    assert steps <= longest
    # What is left of the time is less than another epoch would take, with its validations.
    unused = 60 * minutes * (1 - RESERVE) - seconds
    an_epoch = steps / found.config["epochs"] * timing.step
    assert steps >= 0.95 * longest or unused <= an_epoch + 20 * timing.validation + timing.step


def test_where_time_is_plenty_the_plan_stays_as_it_is(measured: Measured) -> None:
    found = within(600, measured, Timing(10, 0.1, 0.1, 0.1))
    usual = propose(*measured, CPU)
    assert found.config == usual.config
    assert found.plan == usual.plan
    reason = next(d.reason for d in found.decisions if d.name == "length")
    assert "of 600 minutes, and longer ones are unproven" in reason


def test_a_network_of_full_resolution_needs_enough_steps_to_pay(measured: Measured) -> None:
    full, strided = Timing(10, 0.1, 0.3, 0.1), Timing(10, 0.1, 0.1, 0.1)
    enough = (10 + FULL_RESOLUTION_STEPS * 0.3) / 60 / (1 - RESERVE)
    kept, changed = within(1.1 * enough, measured, full, strided), within(0.9 * enough, measured, full, strided)
    assert kept.config["full_resolution"]
    assert kept.plan == propose(*measured, CPU).plan
    assert not changed.config["full_resolution"]
    facts = [case.facts for case in measured[1].measures]
    keys = changed.config
    assert changed.plan == make_plan(measured[0], facts, keys["patch_size"], keys["pixdim"], keys["base_channels"])
    assert changed.plan.strides[0] != (1, 1, 1)
    assert duration(changed, strided)[0] > duration(kept, full)[0]


def test_the_weights_are_averaged_over_the_same_share_of_a_shorter_training(measured: Measured) -> None:
    short = within(1, measured, Timing(5, 0.1, 0.1, 0.1))
    steps, _ = duration(short, Timing(5, 0.1, 0.1, 0.1))
    assert 1 / (1 - short.config["ema_decay"]) == pytest.approx(steps / 30, rel=0.1)
    assert short.config["keep_weights"] == "last"


def test_a_training_that_sees_each_case_rarely_does_not_change_it(measured: Measured) -> None:
    timing = Timing(5, 0.1, 0.1, 0.1)
    for minutes in (0.2, 0.5, 1, 2, 4):
        found = within(minutes, measured, timing)
        passes = found.config["epochs"] * found.config["case_repeats"]
        assert found.config.get("augmentation", 1.0) == (0.0 if passes <= FEW_PASSES else 1.0)
    assert "augmentation" not in propose(*measured, CPU).config


@pytest.mark.parametrize("minutes", [0.0, -3.0, math.inf, math.nan])
def test_minutes_are_a_positive_number(measured: Measured, minutes: float) -> None:
    with pytest.raises(ValueError, match=r"Expected `--minutes` to be a positive number, but got .*: give minutes"):
        within(minutes, measured, Timing(1, 1, 1, 1))


def test_too_few_minutes_are_refused_with_the_number_that_suffices(measured: Measured) -> None:
    slow = Timing(30, 1, 2, 1)
    with pytest.raises(ValueError, match=r"enough for a training on 3 cases, but got 1: on this machine it takes") as e:
        within(1, measured, slow)
    least = float(str(e.value).split()[-3])
    assert duration(within(least, measured, slow), slow)[1] <= 60 * least


def test_another_machine_cannot_be_timed(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"Expected a GPU to time steps on for `--minutes`, but torch finds none: run"):
        propose_within(5, *measured, Machine("cuda", 20 * GIB, 8 * GIB, "22 GiB by --memory-gb"))


@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
def test_the_command_times_real_steps_and_writes_nothing_else(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monai_iou.planning.timing.MAX_STEPS", 3)
    monkeypatch.setattr("monai_iou.planning.timing.IMPORTS", "")
    monkeypatch.chdir(tmp_path)
    timings: list[Timing] = []

    def measure(*args: Any) -> Timing:
        timings.append(measure_timing(*args))
        return timings[-1]

    monkeypatch.setattr(propose_within, "__kwdefaults__", {"measure": measure})
    minutes = 5000.0
    arguments = ["plan", str(measured[0].root), "--device", "cpu", "--memory-gb", "8", "--minutes", str(minutes)]
    assert main(arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    written = json.loads((tmp_path / "plan.json").read_text())
    assert timings[-1].step > 0
    assert timings[-1].validation > 0
    reasons = {row["decision"]: row["reason"] for row in written["plan_report"]["decisions"]}
    assert "of 5000 minutes" in reasons["length"]
    assert written["epochs"] == propose(*measured, CPU).config["epochs"]
    assert len(timings) == 1


@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
def test_cases_with_foreground_are_timed_however_many_come_before_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_phantom_dataset(tmp_path / "data", training=6, evaluation=0, shape=(24, 24, 20))
    for index in range(4):
        path = data / "labelsTr" / f"phantom_{index:02d}.nii.gz"
        label = nib.load(path)
        nib.save(nib.Nifti1Image(np.zeros(label.shape, np.uint8), label.affine, label.header), path)
    folder = read_folder(data)
    fingerprint = compute_fingerprint(folder)
    timed: list[SegmentationFolder] = []

    def measure(folder: SegmentationFolder, *_: Any) -> Timing:
        timed.append(folder)
        return Timing(10, 0.1, 0.1, 0.1)

    planned = propose_within(600, folder, fingerprint, CPU, measure=measure)
    assert [case.name[-1] for case in timed[0].training] == ["4", "5", "0", "1", "2", "3"]
    assert replace(timed[0], training=folder.training) == folder
    # The controls alone cannot be trained on; the sentence is this package's, and not MONAI's about an expression.
    monkeypatch.setattr("monai_iou.planning.timing.IMPORTS", "")
    with pytest.raises(DatasetError) as caught:
        measure_timing(folder, planned.plan, planned.config, CPU)
    assert str(caught.value) == (
        f"Expected the labels of `training` in {data.resolve()}/dataset.json to have foreground, but all 4 are empty: "
        "add cases with voxels of lesion."
    )


@pytest.mark.parametrize("spelling", ["validate#inferer#device", "+validate::inferer::device"])
def test_a_key_that_is_timed_may_be_spelt_as_monai_allows(
    spelling: str, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Mapping[str, Any]] = []
    monkeypatch.setattr("monai_iou.planning.timing._measured", lambda _f, _p, config, _m: given.append(config))
    measure_timing(measured[0], make_plan(None, [], [8, 8, 8]), {"batch_size": 2}, CPU, {spelling: "cpu", "x": 1})
    assert given == [{"batch_size": 2, "validate#inferer#device": "cpu"}]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried 2.00 GiB")])
def test_full_memory_is_answered_with_what_the_command_takes(
    error: Exception,
    measured: Measured,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr("monai_iou.planning.timing._measured", full)
    file = tmp_path / "plan.json"
    arguments = ["plan", str(measured[0].root), f"--output={file}", "--device=cpu", "--memory-gb=8", "--minutes=5000"]
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert told.splitlines()[-1] == (
        "Error: Expected the run to fit into memory, but it ran out of it: give a smaller --memory-gb or, if a "
        "validation takes too much, give `monai-iou train` --minutes together with --sw_batch_size 1 and "
        "--validate#inferer#device cpu."
    )
    assert "Traceback" not in told
    assert not file.exists()


@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
def test_a_training_is_timed_with_the_keys_that_lower_the_memory_of_a_validation(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Mapping[str, Any]] = []

    def time(_: SegmentationFolder, plan: Plan, config: Mapping[str, Any], machine: Machine) -> Timing:
        used.append(config)
        parser, _cases = _parser(measured[0], plan, config, machine)
        inferer = parser.get_parsed_content("validate#inferer")
        assert (inferer.device, inferer.sw_device, inferer.sw_batch_size) == ("cpu", "cpu", 1)
        return Timing(10, 0.1, 0.1, 0.1)

    monkeypatch.setattr("monai_iou.planning.timing._measured", time)
    memory = {"sw_batch_size": 1, "validate#inferer#device": "cpu", "validate::inferer::sw_device": "cpu"}
    options = {"device": "cpu", "memory_gb": 8.0, "minutes": 5000.0, "keys": {**memory, "learning_rate": 1.0}}
    write_plan(measured[0].root, tmp_path / "plan.json", None, None, options)
    planned = propose(*measured, detect_hardware("cpu", 8.0)).config
    timed = {name.replace("::", "#"): value for name, value in memory.items()}
    assert used == [{**planned, **timed}], "and no other key"
    written = json.loads((tmp_path / "plan.json").read_text())
    assert not {*memory} & {*written}, "they stay keys of the command"


def uneven(root: Path) -> SegmentationFolder:
    """Twelve cases, eight of which are of one patient."""
    data = write_phantom_dataset(root / "data", training=12, evaluation=0, shape=(24, 24, 20))
    content = json.loads((data / "dataset.json").read_text())
    groups = {"P1": [f"phantom_{index:02d}" for index in range(8)]}
    (data / "dataset.json").write_text(json.dumps({**content, "patient_groups": groups}))
    return read_folder(data)


def test_every_fold_ends_in_time_and_one_alone_by_its_own_cases(tmp_path: Path) -> None:
    folder = uneven(tmp_path)
    fingerprint = compute_fingerprint(folder)
    sides = [(len(trained), len(held)) for trained, held in (folder.split(0.1, 0, 5, fold) for fold in range(5))]
    assert sorted(sides) == [(4, 8), (11, 1), (11, 1), (11, 1), (11, 1)]
    timing = Timing(10, 0.5, 1.0, 3.0)

    def planned(fold: int | None) -> Proposal:
        return propose_within(60, folder, fingerprint, CPU, 5, fold, measure=lambda *_: timing)

    together = planned(None)
    found = [duration(together, timing, 12, held_out)[1] for _, held_out in sides]
    assert max(found) <= 3600
    assert max(found) > 0.8 * 3600 * (1 - RESERVE), "most of the time is used"
    for fold, (trained, held_out) in enumerate(sides):
        alone = duration(planned(fold), timing, trained + held_out, held_out)
        assert 0.8 * 3600 * (1 - RESERVE) < alone[1] <= 3600 or alone[0] == wanted(folder, fingerprint, fold, trained)


def wanted(folder: SegmentationFolder, fingerprint: Fingerprint, fold: int, trained: int) -> int:
    """The steps of a fold without a limit."""
    keys = propose(folder, fingerprint, CPU, 5, fold).config
    return int(keys["epochs"] * (keys["case_repeats"] * trained // keys["batch_size"]))


@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
@pytest.mark.parametrize("options", [["--folds=3"], ["--folds=3", "--fold=2"]])
def test_the_command_plans_for_all_folds_or_for_one(
    options: list[str], measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monai_iou.planning.timing.MAX_STEPS", 3)
    monkeypatch.setattr("monai_iou.planning.timing.IMPORTS", "")
    folds: list[Any] = []

    def planned(*args: Any) -> Proposal:
        folds.append(args[-1])
        return propose_within(*args)

    monkeypatch.setattr("monai_iou.planning.minutes.propose_within", planned)
    file = tmp_path / "plan.json"
    arguments = ["plan", str(measured[0].root), f"--output={file}", "--device=cpu", "--memory-gb=8", "--minutes=5000"]
    assert main([*arguments, *options]) == 0
    assert folds == [2 if len(options) > 1 else None]
    assert json.loads(file.read_text())["fold"] == (2 if len(options) > 1 else 0)
