"""`start_from`: whose weights a training starts from, what is refused, and that a resumed training keeps its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import bundle_command, causes, overrides, run_command
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

from monai_iou.bundle_files import copy_bundle
from monai_iou.datasets.cases import DatasetError
from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.demo import run_workflow
from monai_iou.planning.plan import make_plan
from monai_iou.planning.stored import load_plan
from monai_iou.workflow import starting_weights
from monai_iou.workflow.checkpoint_files import write_atomically
from monai_iou.workflow.optimization import WeightAverage
from monai_iou.workflow.settings import Settings
from monai_iou.workflow.starting_weights import check_start, model_file, start_from

pytestmark = [pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")]
STILL = 1e-12  # a learning rate by which nothing moves


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom_dataset(tmp_path_factory.mktemp("data"), training=4, evaluation=1, shape=(24, 24, 16))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = copy_bundle(tmp_path_factory.mktemp("trained") / "bundle")
    run_workflow(bundle, ["train"], overrides(bundle, data, epochs=1, overwrite=False))
    return bundle


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(path, weights_only=True)
    return dict(content.get("model", content))


def furthest(one: Path, other: Path) -> float:
    pairs = zip(weights_of(one).values(), weights_of(other).values(), strict=True)
    return max(float((first.float() - second.float()).abs().max()) for first, second in pairs)


@pytest.mark.parametrize("ema_decay", [pytest.param(None, marks=pytest.mark.slow), 0.9])
def test_a_training_starts_from_a_model_and_resumes_from_itself(
    ema_decay: float | None, trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, model = copy_bundle(tmp_path / "bundle"), trained / "models" / "model.pt"
    keys = {"start_from": str(trained), "overwrite": False, "seed": 1, "ema_decay": ema_decay}
    run_workflow(bundle, ["train"], overrides(bundle, data, epochs=1, learning_rate=STILL, **keys))
    assert f" The training starts from the weights of {model}.\n" in capsys.readouterr().out
    for name in ("last_epoch.pt", "model.pt"):
        assert furthest(bundle / "models" / name, model) < 1e-6
    run_workflow(bundle, ["train"], overrides(bundle, data, epochs=2, learning_rate=0.1, resume=True, **keys))
    last = bundle / "models" / "last_epoch.pt"
    lines = [line for line in capsys.readouterr().out.splitlines() if "start_from" in line]
    assert [line.partition(" INFO ")[2] for line in lines] == [
        f"`start_from` has no effect on a training that is resumed from {last}."
    ]
    before = shutil.copy(last, tmp_path)
    moved = furthest(Path(before), model)
    assert moved > 1e-3
    loader = {"_target_": "CheckpointLoader", "load_path": str(model), "load_dict": {"model": "@net"}}
    (bundle / "configs" / "loader.json").write_text(json.dumps({"+train#handlers": [loader]}), encoding="utf-8")
    resumed = overrides(bundle, data, epochs=3, learning_rate=STILL, resume=True, **{**keys, "start_from": None})
    run_workflow(bundle, ["train", "loader"], resumed)
    assert furthest(last, Path(before)) < 1e-6, "not what a CheckpointLoader of the user's own loads"
    assert "start_from" not in capsys.readouterr().out


def test_the_cases_that_the_model_has_seen_stay_seen(trained: Path, data: Path, tmp_path: Path) -> None:
    seen = json.loads((trained / "models" / "model.json").read_text(encoding="utf-8"))
    for number, start in enumerate((trained / "models" / "model.pt", trained / "models" / "last_epoch.pt")):
        bundle = copy_bundle(tmp_path / str(number))
        keys = {"start_from": str(start), "overwrite": False, "split_seed": 3, "epochs": 1}
        run_workflow(bundle, ["train"], overrides(bundle, data, **keys))
        stored = json.loads((bundle / "models" / "model.json").read_text(encoding="utf-8"))
        assert {*stored["trained"]} > {*seen["trained"]}
        assert {*stored["trained_images"]} > {*seen["trained_images"]}
        assert len(stored["trained"]) == len({*stored["trained"]}) == len(stored["trained_images"])


def settings(start: Path | None, folder: Path, *, resume: bool = False) -> Settings:
    return Settings(start_from=start, ckpt_dir=str(folder), resume=resume)


def test_a_model_of_another_network_is_refused_with_the_first_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, path = torch.nn.Linear(2, 3), tmp_path / "a.pt"
    remedy = (
        "train with the channels, classes, `network`, `network_def`, `base_channels`, `full_resolution`, "
        "`patch_size` and `pixdim` of that model (with --epochs instead of --minutes), or leave --start_from out."
    )
    weights = network.state_dict()
    for content, difference in [
        ({**weights, "weight": torch.zeros(3, 4)}, "`weight` has the shape (3, 4) instead of (3, 2)"),
        ({"weight": weights["weight"]}, "there is no `bias`"),
        ({**weights, "more": torch.zeros(1)}, "there is `more`, which this network lacks"),
        ({"state_dict": weights}, "there is no `weight`"),
    ]:
        write_atomically(content, path)
        with pytest.raises(DatasetError) as caught:
            check_start(network, settings(path, tmp_path))
        assert str(caught.value) == (
            f"Expected `start_from` to be a model of the network that is trained here, but in {path} {difference}: "
            f"{remedy}"
        )
    monkeypatch.setattr(starting_weights, "is_bundle_command", lambda: True)  # it has no --minutes
    with pytest.raises(DatasetError, match="and `pixdim` of that model, or leave --start_from out"):
        check_start(network, settings(path, tmp_path))
    write_atomically({**weights, "bias": torch.full((3,), torch.nan)}, path)
    with pytest.raises(DatasetError, match="to hold finite weights, but `bias` has NaN"):
        check_start(network, settings(path, tmp_path))
    path.write_text("no checkpoint", encoding="utf-8")
    with pytest.raises(DatasetError, match="to be a trained model, but it cannot be read: copy it again"):
        check_start(network, settings(path, tmp_path))
    torch.jit.save(torch.jit.script(network), path)
    with pytest.raises(DatasetError, match="to be a trained model, but it cannot be read: copy it again"):
        check_start(network, settings(path, tmp_path))
    (tmp_path / "last_epoch.pt").touch()
    check_start(network, settings(path, tmp_path, resume=True))  # it has weights of its own
    check_start(network, settings(None, tmp_path))


def test_a_path_without_a_model_is_named(tmp_path: Path) -> None:
    start = "Expected `start_from` to be a trained model, but got"
    with pytest.raises(DatasetError) as caught:
        model_file(str(tmp_path / "no"))
    assert str(caught.value) == f"{start} {tmp_path / 'no'}, and there is no such file: check the path."
    what = f"{start} {tmp_path}, and that folder has no model.pt and no models/model.pt"
    with pytest.raises(DatasetError) as caught:
        model_file(str(tmp_path))
    assert str(caught.value) == f"{what}: name the folder of a training."
    for fold in ("fold0", "fold1"):
        write_atomically({}, tmp_path / fold / "models" / "model.pt")
    with pytest.raises(DatasetError) as caught:
        model_file(str(tmp_path))
    assert str(caught.value) == f"{what}: name one fold, such as {tmp_path / 'fold0'}."
    model = tmp_path / "fold1" / "models" / "model.pt"
    assert {model_file(str(path)) for path in (model, model.parent, model.parent.parent)} == {model}


def test_a_model_without_a_plan_has_seen_nothing_that_is_known(tmp_path: Path) -> None:
    network = torch.nn.Linear(2, 3)
    write_atomically(torch.nn.Linear(2, 3).state_dict(), tmp_path / "model.pt")
    average = WeightAverage(network, torch.optim.SGD(network.parameters(), lr=0.1), 0.9)
    plan = make_plan(None, [], [16, 16, 16], base_channels=4)
    assert start_from(str(tmp_path), network, average, plan) == plan
    expected = weights_of(tmp_path / "model.pt")
    for each in (network, average.network):
        assert all(torch.equal(each.state_dict()[name], value) for name, value in expected.items())


def test_a_copied_model_keeps_its_cases_under_any_name(trained: Path, tmp_path: Path) -> None:
    network = torch.nn.Linear(2, 3)
    average = WeightAverage(network, torch.optim.SGD(network.parameters(), lr=0.1), 0.9)
    plan = make_plan(None, [], [16, 16, 16], base_channels=4)
    seen = load_plan(trained / "models" / "model.json")
    assert seen.trained
    shutil.copy(trained / "models" / "model.json", tmp_path)
    (tmp_path / "other.json").write_text('{"dataset": "x"}', encoding="utf-8")
    for name in ("base.pt", "other.pt", "last_epoch.pt"):
        write_atomically(network.state_dict(), tmp_path / name)
        made = start_from(str(tmp_path / name), network, average, plan)
        assert made is not None
        assert (made.trained, made.trained_images) == (seen.trained, seen.trained_images)


@pytest.mark.parametrize("name", ["base.pt", "last_epoch.pt"])
def test_a_model_whose_cases_are_not_known_is_warned_of(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network, file = torch.nn.Linear(2, 3), tmp_path / name
    average = WeightAverage(network, torch.optim.SGD(network.parameters(), lr=0.1), 0.9)
    plan = make_plan(None, [], [16, 16, 16], base_channels=4)
    file.with_suffix(".json").write_text("[]", encoding="utf-8")
    write_atomically(network.state_dict(), file)
    assert start_from(str(file), network, average, plan) == plan
    assert [each.getMessage() for each in caplog.records if each.levelname == "WARNING"] == [
        f"No plan lies beside {file}: the cases that it was trained on are not known and may be scored as unseen."
    ]


@pytest.mark.slow
def test_the_bundles_command_takes_it_too(trained: Path, data: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(tmp_path / "bundle")
    keys: dict[str, Any] = {"start_from": trained, "overwrite": False, "epochs": 1}
    wrong = run_command(bundle_command(bundle, ["train"], overrides(bundle, data, **{**keys, "base_channels": 8})))
    assert wrong.returncode == 1
    assert wrong.stderr.splitlines()[-1].startswith("monai_iou: Expected `start_from` to be a model of the network")
    right = run_command(bundle_command(bundle, ["train"], overrides(bundle, data, **keys, learning_rate=STILL)))
    assert right.returncode == 0, right.stderr
    assert furthest(bundle / "models" / "model.pt", trained / "models" / "model.pt") < 1e-6


def test_a_wrong_model_ends_the_training_before_volumes_are_prepared(
    trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from monai_iou.workflow import caching

    monkeypatch.setattr(caching, "cached_dataset", lambda *_, **__: pytest.fail("a volume was prepared"))
    bundle = copy_bundle(tmp_path / "bundle")
    keys = {"start_from": str(trained), "overwrite": False, "base_channels": 8}
    with pytest.raises(RuntimeError) as wrapped:
        run_workflow(bundle, ["train"], overrides(bundle, data, **keys))
    assert any("to be a model of the network that is trained here" in str(each) for each in causes(wrapped.value))


def test_a_validation_at_the_start_is_of_the_weights_that_the_training_starts_from(
    trained: Path, data: Path, tmp_path: Path
) -> None:
    bundle = copy_bundle(tmp_path / "bundle")
    keys = {"start_from": str(trained), "overwrite": False, "seed": 1, "train#handlers#1#exec_at_start": True}
    made = ConfigWorkflow(
        config_file=str(bundle / "configs" / "train.json"), workflow_type="train",
        **overrides(bundle, data, epochs=1, **keys),
    )  # fmt: skip
    made.initialize()
    network, evaluator = (made.parser.get_parsed_content(name) for name in ("net", "validate#evaluator"))
    validated: list[dict[str, torch.Tensor]] = []

    @evaluator.on(Events.STARTED)
    def note() -> None:
        validated.append({name: value.clone() for name, value in network.state_dict().items()})

    made.run()
    assert len(validated) == 2, "at the start and after the epoch"
    for name, value in weights_of(trained / "models" / "model.pt").items():
        assert torch.equal(validated[0][name], value), name
