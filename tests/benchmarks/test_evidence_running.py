"""The runner of the studies: what it makes, in which order, what a kill leaves; its page of results."""

from __future__ import annotations

import doctest
import importlib
import json
import math
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from evidence_rows import CASE, RUN, SUMMARY
from places import DATA as REAL
from places import DOCS

from benchmarks.evidence import __main__ as command
from benchmarks.evidence import running, tables
from benchmarks.evidence.choices import COPIED_LESIONS, LOSSES, SAMPLERS
from benchmarks.evidence.data import DATA, Data
from benchmarks.evidence.datasets import BUILDERS, build
from benchmarks.evidence.running import NETWORK, score_masks, summary
from benchmarks.evidence.shapes import Contrast, make_image
from benchmarks.evidence.studies import STUDIES, Run, Study, overrides
from benchmarks.evidence.tables import (
    CASE_COLUMNS,
    add_run,
    missing,
)
from monai_iou.bundle_files import bundle_path


def test_docstring_examples() -> None:
    for name in ("studies", "datasets", "hippocampi"):
        assert doctest.testmod(importlib.import_module(f"benchmarks.evidence.{name}")).failed == 0


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_a_study_makes_every_choice_with_a_seed_before_the_next_seed(study) -> None:
    runs = study.runs()
    assert len(set(runs)) == len(runs)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    seeds = [{run.key[:3] + run.key[4:] for run in runs if run.seed == seed} for seed in study.seeds]
    assert all(made == seeds[0] for made in seeds)
    assert study.baseline[0] in study.losses
    assert study.baseline[1] in study.samplers
    assert {*study.quick.get("data", ()), *study.data} <= set(DATA)
    assert study.primary in CASE_COLUMNS


def test_single_data_losses_and_choices_may_have_more_seeds() -> None:
    more = {"0.03 %": (3,), "ce": (4,), "iou, voxels": (5,), "0.1 %, iou": (6,)}
    study = Study("x", "?", ("0.1 %", "0.03 %"), ("iou", "ce"), ("iou", "voxels"), more_seeds=more)
    later = [(run.data, run.loss, run.seed) for run in study.runs() if run.seed > 2]
    assert later == [
        ("0.03 %", "iou", 3), ("0.03 %", "ce", 3), ("0.1 %", "ce", 4), ("0.03 %", "ce", 4),
        ("0.1 %", "iou", 5), ("0.03 %", "iou", 5), ("0.1 %", "iou", 6),
    ]  # fmt: skip
    for known in STUDIES.values():
        of_data = {f"{data}, {loss}" for data in known.data for loss in known.losses}
        assert set(known.more_seeds) <= {*known.data, *known.losses, *of_data, *map(", ".join, known.choices)}
        assert not {seed for more in known.more_seeds.values() for seed in more} & set(known.seeds)


def test_single_choices_may_be_made_beside_all_losses_with_all_samplers() -> None:
    more = (("ce", "q=0"), ("iou", "q=1"))
    study = Study("x", "?", ("0.1 %",), ("iou",), ("iou", "voxels"), seeds=(0, 1), more_choices=more)
    made = [(run.loss, run.sampler, run.seed) for run in study.runs()]
    assert made == [(*choice, seed) for seed in (0, 1) for choice in (("iou", "voxels"), *more)]
    assert [(run.loss, run.sampler) for run in study.runs(quick=True)] == [("iou", "voxels"), *more]


def test_cells_of_both_kinds_differ_from_the_planned_loss_by_nothing_else() -> None:
    """`InstanceIoULoss` as the bundle makes it by `instance`, but for `cells`."""
    from monai.bundle import ConfigParser

    from monai_iou.planning.plan import make_plan
    from monai_iou.workflow.variants import build_loss

    plan = make_plan(None, [], [16, 16, 16], base_channels=4)
    losses = {}
    for name in ("iou+ce/3", "instance, both cells"):
        own = ConfigParser(dict(LOSSES[name])).get_parsed_content("loss")
        losses[name] = build_loss(own, plan, instance=True)
    reference, both = losses.values()
    assert (reference.cells, both.cells) == ("reference", "both")
    both.cells = "reference"
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 2, 16, 16, 16), (torch.rand(2, 1, 16, 16, 16) < 0.02).long()
    torch.testing.assert_close(both(logits, labels), reference(logits, labels))


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_runs_of_a_study_differ_by_what_they_name_alone(study) -> None:
    allowed = {key for choice in (*LOSSES.values(), *SAMPLERS.values()) for key in choice} | {"seed"}
    for data in (name for name in study.data if not DATA[name].minutes):
        runs = [run for run in study.runs() if run.data == data]
        chosen = [{k: v for k, v in overrides(run).items() if k not in allowed} for run in runs]
        assert all(one == chosen[0] for one in chosen)


@pytest.mark.parametrize("loss", LOSSES)
def test_overrides_change_keys_that_the_bundle_has(loss: str) -> None:
    config = json.loads((bundle_path() / "configs" / "train.json").read_text())
    chosen = overrides(Run("compound", "phantoms", loss, "voxels", 3, 0))
    assert chosen["seed"] == 3
    new = {key.partition("#")[0] for key in chosen} - set(config) - {"planned"}
    assert all(re.search(rf"@{key}\b", json.dumps(chosen)) for key in new), (
        "a key that nothing reads would change nothing"
    )


def test_copied_lesions_are_those_of_the_page() -> None:
    text = (DOCS / "bundle.md").read_text(encoding="utf-8")
    (page,) = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL) if "copying" in block]
    page["copying"]["prob"] = page.pop("copy_lesions")
    assert page["copying"].pop("ignore_index") == "$@plan.ignore_index"  # the studies' labels ignore nothing
    # nor have they several raters, or cells beside copied lesions
    order = "train#preprocessing#transforms"
    raters = (
        "(monai_iou.workflow.targets.with_drawn_rater(@train#deterministic_transforms, @drawn_rater) "
        "if monai_iou.workflow.labelled.draws_raters(@cases) "
    )
    cells = "([@component_regions] if monai_iou.workflow.settings.is_true(@instance, 'instance') and not "
    cells += "monai_iou.workflow.targets.has_maps(@plan) else []) + "
    for part in (raters + "else @train#deterministic_transforms)", cells):
        assert part in page[order]
        page[order] = page[order].replace(part, "@train#deterministic_transforms" * (part != cells))
    assert page == COPIED_LESIONS


def test_inference_knows_the_keys_of_the_network() -> None:
    config = json.loads((bundle_path() / "configs" / "inference.json").read_text())
    assert set(NETWORK) <= set(config)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_crops_replace_the_bundles_first_random_transform_or_its_two_keys(sampler: str) -> None:
    config = json.loads((bundle_path() / "configs" / "train.json").read_text())
    assert config["train"]["deterministic_transforms"][-1]["_target_"].endswith("LesionIndicesd")
    assert config["train"]["random_transforms"][0]["_target_"].endswith("RandCropByLesionsd")
    chosen = overrides(Run("sampler", "unequal", "iou", sampler, 0, 0))
    assert {"size_exponent", "crop_jitter"} <= set(chosen) or "train#random_transforms#0" in chosen
    assert {"size_exponent", "crop_jitter"} <= set(config)


def test_the_losses_of_the_study_of_weights_are_what_their_names_say() -> None:
    """IoU + CE and Dice + CE with each weight against torch's cross-entropy and MONAI's region losses."""
    import torch
    from monai.bundle import ConfigParser
    from monai.losses import DiceLoss

    torch.manual_seed(0)
    logits, labels = torch.randn(2, 2, 6, 6, 4), torch.randint(0, 2, (2, 1, 6, 6, 4))
    shared = {"softmax": True, "to_onehot_y": True, "include_background": False, "batch": True}
    terms = {name: DiceLoss(**shared, jaccard=name == "iou")(logits, labels) for name in ("iou", "dice")}
    entropy = torch.nn.functional.cross_entropy(logits, labels[:, 0])
    for name, term in terms.items():
        for suffix, weight in (("+ce", 1.0), ("+ce/3", 1 / 3), ("+ce/10", 0.1), ("", 0.0)):
            loss = ConfigParser(dict(LOSSES[name + suffix])).get_parsed_content("loss")
            torch.testing.assert_close(loss(logits, labels), term + weight * entropy, rtol=1e-4, atol=1e-5)


def test_a_checkout_that_moves_during_a_run_costs_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter(["abc", "def", "def"])
    monkeypatch.setattr(running, "commit", lambda: next(commits))
    monkeypatch.setattr(running, "build", lambda *_, **__: tmp_path)
    monkeypatch.setattr(running, "train", lambda *_, **__: [1.0])
    monkeypatch.setattr(running, "segment", lambda *_: None)
    monkeypatch.setattr(running, "score", lambda *_: [CASE])
    with pytest.raises(RuntimeError, match="to be made by one commit, but abc became def: make it again"):
        running.make_run(RUN, tmp_path, tmp_path / "output", quick=False)
    assert missing(tmp_path, [RUN]) == [RUN]


@pytest.mark.parametrize("quick", [False, True])
def test_what_another_study_made_is_copied_but_for_quick_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    run, other = (Run(study, "unequal", "iou+ce/3", "q=1/2", 2, 0) for study in ("choices", "sampler"))
    add_run(tmp_path, other, {**SUMMARY, "cases": 1, "commit": "abc"}, [CASE])
    asked: list[Run] = []
    monkeypatch.setattr(tables, "trains_as_now", lambda _: True)
    monkeypatch.setattr(running, "_in_a_process", lambda run, *_, **__: asked.append(run) or True)
    assert running.run_all([run], 1, tmp_path, tmp_path, quick=quick) == 0
    assert asked == ([run] if quick else [])


def test_a_run_has_the_threads_that_its_data_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def start(*_: object, env: dict[str, str], **__: object) -> subprocess.CompletedProcess[bytes]:
        found.append((env["OMP_NUM_THREADS"], env["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"]))
        return subprocess.CompletedProcess([], 0)

    monkeypatch.setattr(running.subprocess, "run", start)
    runs = [RUN, Run("minutes", "task904, 30 min, 2 threads", "ours", "own", 0, 0)]
    assert running.run_all(runs, 1, tmp_path, tmp_path, quick=True) == 0
    assert found == [("1", "1"), ("2", "2")]


def test_scores_of_masks_against_counts_by_hand() -> None:
    reference = np.zeros((12, 6, 4), dtype=bool)
    prediction = reference.copy()
    reference[0:2, 0:2, 0:2] = reference[5, 5, 3] = True  # 8 voxels and 1
    prediction[1:3, 0:2, 0:2] = prediction[9:11, 0, 0] = True  # half of the first, and 2 voxels of nothing
    scores = score_masks(prediction, reference, (1.0, 1.0, 2.0))
    assert scores["iou"] == pytest.approx(4 / 15)
    assert scores["dice"] == pytest.approx(8 / 19)
    assert scores["lesion_f1"] == pytest.approx(2 / (2 + 1 + 1))
    assert [scores[name] for name in ("lesions", "found", "invented", "missed")] == [2, 1, 1, 1]
    assert math.isnan(score_masks(reference & False, reference & False, (1, 1, 1))["iou"])


def test_a_summary_leaves_out_undefined_scores() -> None:
    cases = [{**CASE, "case": str(i), "iou": value} for i, value in enumerate((0.5, math.nan, 1.0))]
    found = summary([4.0, 2.0, 1.0, 1.0], 2, cases)
    assert (found["cases"], found["iou"], found["first_loss"], found["last_loss"], found["steps"]) == (3, 0.75, 3, 1, 4)


def test_a_data_set_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def builder(folder: Path, fold: int, **arguments: object) -> None:
        made.append((fold, arguments))
        folder.mkdir()
        if len(made) > 1:
            (folder / "dataset.json").touch()

    monkeypatch.setitem(BUILDERS, "phantoms", builder)
    folders = [build("phantoms", 0, tmp_path) for _ in range(3)]
    assert set(folders) == {tmp_path / "phantoms-0"}
    assert made == [(0, DATA["phantoms"].arguments)] * 2  # the first left no dataset.json, as where it was killed


def test_a_quick_run_tests_one_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from monai_iou.datasets.folder import read_folder

    tiny = Data("phantoms", {"training": 2, "evaluation": 2, "shape": (24, 24, 16)})
    monkeypatch.setitem(DATA, "phantoms", tiny)
    whole, quick = (read_folder(build("phantoms", 0, tmp_path / str(one), quick=one)) for one in (False, True))
    assert (len(whole.evaluation), len(quick.evaluation), len(quick.test)) == (2, 1, 1)
    assert len(whole.training) == len(quick.training) == 2


@pytest.mark.real_data
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}")
def test_a_fold_of_the_scans_leaves_two_patients_out(tmp_path: Path) -> None:
    from benchmarks.evidence.datasets import patient_of
    from monai_iou.datasets.folder import read_folder

    held_out = []
    for fold in range(DATA["task901"].folds):
        folder = read_folder(build("task901", fold, tmp_path))
        tested, trained = ({patient_of(case.name) for case in part} for part in (folder.evaluation, folder.training))
        assert len(folder.evaluation) == len(folder.test) == 8 - len(folder.training)
        assert (len(tested), len(trained)) == (2, 4)
        assert not tested & trained
        held_out += tested
    assert len(set(held_out)) == 6


@pytest.mark.real_data
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}")
def test_folds_and_numbers_of_volumes_of_real_data(tmp_path: Path) -> None:
    from monai_iou.datasets.folder import read_folder

    folds = [read_folder(build("task902", fold, tmp_path)) for fold in range(3)]
    tested = [{case.name for case in folder.evaluation} for folder in folds]
    assert [len(names) for names in tested] == [7, 7, 7]
    assert len(set.union(*tested)) == 21
    assert all(len(folder.training) == 14 for folder in folds)
    few = read_folder(build("task904, 8", 0, tmp_path))
    assert (len(few.training), len(few.evaluation)) == (8, 26)


def test_made_images_have_the_contrast_asked_for() -> None:
    contrast = Contrast(lesion=2.0, lesion_spread=0.6, tissue=1.0, noise=0.5)
    lesions = np.zeros((40, 40, 32), dtype=bool)
    lesions[5:14, 5:14, 5:14] = lesions[25:34, 25:34, 20:28] = lesions[30, 5, 5] = True
    images = np.array([make_image(lesions, contrast, seed) for seed in range(8)])
    np.testing.assert_array_equal(images[3], make_image(lesions, contrast, 3))
    assert len({image.tobytes() for image in images}) == 8
    core = np.zeros_like(lesions)
    core[7:12, 7:12, 7:12] = core[27:32, 27:32, 22:26] = True
    scaled = (images - 100) / 20
    far = np.ones_like(lesions)
    far[2:17, 2:17, 2:17] = far[22:37, 22:37, 17:31] = far[27:34, 2:9, 2:9] = False
    assert np.mean([image[core].mean() for image in scaled]) == pytest.approx(2.0, abs=0.5)
    assert np.median(scaled[:, far]) == pytest.approx(0.0, abs=0.25)
    assert scaled[:, far].std() > 1.0  # tissue, noise and distractors
    assert (scaled[:, far] > 2.5).mean() > 0.01  # which are as bright as lesions


@pytest.mark.parametrize(
    ("arguments", "status"), [([], 2), (["--study", "unknown"], 2), (["--study", "compound", "--jobs", "0"], 2)]
)
def test_wrong_arguments_end_with_status_2(arguments: list[str], status: int) -> None:
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == status


def test_a_study_that_needs_a_gpu_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    given = ["--study", "precision", "--results", str(tmp_path), "--output", str(tmp_path)]
    assert command.main(given) == 2
    assert capsys.readouterr().err == "Expected a GPU for precision, but torch finds none: try it with --quick.\n"
    assert list(tmp_path.iterdir()) == []
