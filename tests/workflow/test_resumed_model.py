"""`model.pt` after a resumed training: the weights that it chose, not those that an earlier part has left there."""

from __future__ import annotations

import errno
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import causes, overrides
from growing_weight import growing_weight
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow

from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.demo import run_workflow
from monai_iou.planning.stored import load_plan
from monai_iou.workflow.checkpoint_files import write_atomically
from monai_iou.workflow.checkpoints import CheckpointHandler
from monai_iou.workflow.data import BundleCases
from monai_iou.workflow.failures import TrainingError

pytestmark = [pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")]
# Four steps an epoch, or three.
NO_SCORE = [pytest.param({"val_fraction": 0}), pytest.param({"val_interval": 9}, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom_dataset(tmp_path_factory.mktemp("data"), training=4, evaluation=2, shape=(32, 32, 24))


def settings(bundle: Path, data: Path, **changes: Any) -> dict[str, Any]:
    return overrides(bundle, data, **{"batch_size": 1, "val_fraction": 0.25, "overwrite": False, **changes})


def train(bundle: Path, data: Path, **changes: Any) -> None:
    run_workflow(bundle, ["train"], settings(bundle, data, **changes))


def stop_at(step: int, bundle: Path, data: Path, **changes: Any) -> None:
    """Train until SIGTERM comes in a step."""
    config = str(bundle / "configs" / "train.json")
    made = ConfigWorkflow(config_file=config, workflow_type="train", **settings(bundle, data, **changes))
    made.initialize()
    trainer = made.parser.get_parsed_content("train#trainer")
    trainer.add_event_handler(Events.ITERATION_STARTED(once=step), lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        made.run()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module."])
def test_a_checkpoint_with_the_names_of_a_wrapped_network_is_resumed(prefix: str, bundle: Path, data: Path) -> None:
    """Earlier versions stored a compiled or DataParallel network so."""
    train(bundle, data, epochs=1)
    path = bundle / "models" / "last_epoch.pt"
    state = torch.load(path, weights_only=True)
    before = {name: value.clone() for name, value in state["model"].items()}
    write_atomically({**state, "model": {f"{prefix}{name}": value for name, value in before.items()}}, path)
    train(bundle, data, epochs=2, resume=True)
    after = torch.load(path, weights_only=True)
    assert (after["epoch"], after["model"].keys()) == (2, before.keys())


def test_the_weights_that_a_validation_at_the_start_chose_are_stored(bundle: Path, data: Path) -> None:
    at_start = {"train#handlers#1#exec_at_start": True}
    train(bundle, data, epochs=3, val_interval=2)
    third = torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)
    second = torch.load(bundle / "models" / "model.pt", weights_only=True)
    low = {**third, "best_metric": -0.5}  # so that any score is better
    write_atomically(low, bundle / "models" / "last_epoch.pt")
    train(bundle, data, epochs=4, val_interval=9, resume=True, **at_start)
    state = torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)
    model = torch.load(bundle / "models" / "model.pt", weights_only=True)
    assert state["best_metric_epoch"] == 3
    assert all(torch.equal(model[name], value) for name, value in third["model"].items())
    assert not all(torch.equal(model[name], value) for name, value in second.items())


def has_final_weights(bundle: Path, epoch: int) -> bool:
    last, model = (torch.load(bundle / "models" / name, weights_only=True) for name in ("last_epoch.pt", "model.pt"))
    assert last["epoch"] == epoch
    return all(torch.equal(model[name], weights) for name, weights in last["model"].items())


@pytest.mark.parametrize("keys", NO_SCORE, ids=str)
def test_a_training_without_a_score_stores_the_final_weights_also_when_it_is_made_longer(
    keys: dict[str, Any], bundle: Path, data: Path
) -> None:
    train(bundle, data, epochs=1, **keys)
    assert has_final_weights(bundle, 1)
    model = bundle / "models" / "model.pt"
    before = model.stat().st_mtime_ns
    train(bundle, data, epochs=1, resume=True, **keys)
    assert model.stat().st_mtime_ns == before, "nothing was left to do"
    train(bundle, data, epochs=2, resume=True, **keys)
    assert has_final_weights(bundle, 2)
    stop_at(10, bundle, data, epochs=4, resume=True, **keys)
    train(bundle, data, epochs=4, resume=True, **keys)
    assert has_final_weights(bundle, 4)


@pytest.mark.parametrize("keys", NO_SCORE, ids=str)
def test_a_model_that_was_to_be_replaced_is_not_kept(keys: dict[str, Any], bundle: Path, data: Path) -> None:
    train(bundle, data, epochs=1, seed=1)
    stop_at(5, bundle, data, epochs=2, overwrite=True, **keys)
    assert not has_final_weights(bundle, 1), "the earlier training's"
    train(bundle, data, epochs=2, resume=True, **keys)
    assert has_final_weights(bundle, 2)


def test_a_score_on_other_cases_keeps_no_model(bundle: Path, data: Path) -> None:
    train(bundle, data, epochs=1)
    train(bundle, data, epochs=2, resume=True, overwrite=True, val_fraction=0)
    assert has_final_weights(bundle, 2)


def test_a_score_of_nothing_keeps_no_model(tmp_path: Path) -> None:
    def run(epochs: int, *, resume: bool) -> torch.nn.Module:
        network = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
        engines = [Engine(lambda *_: [{"loss": 0.0}]) for _ in range(2)]
        for engine in engines:
            engine.state.rank = 0
        trainer, evaluator = engines
        # What MONAI notes of a first validation in which neither reference nor prediction has a lesion.
        evaluator.state.best_metric, evaluator.state.best_metric_epoch = math.nan, 1
        CheckpointHandler(str(tmp_path), network, optimizer, schedule, evaluator, resume=resume).attach(trainer)
        trainer.run([0], max_epochs=epochs)
        return network

    run(1, resume=False)
    state = torch.load(tmp_path / "last_epoch.pt", weights_only=True)
    write_atomically({**state, "final": False}, tmp_path / "last_epoch.pt")  # as if killed before the end
    write_atomically({"weight": torch.zeros(1, 1), "bias": torch.zeros(1)}, tmp_path / "model.pt")
    network = run(2, resume=True)
    model = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.equal(model[name], weights) for name, weights in network.state_dict().items())


def test_the_best_weights_are_kept_when_a_training_is_made_longer(bundle: Path, data: Path) -> None:
    train(bundle, data, epochs=1)
    best = (bundle / "models" / "model.pt").read_bytes()
    train(bundle, data, epochs=2, val_interval=9, resume=True)
    assert (bundle / "models" / "model.pt").read_bytes() == best


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_further_run_of_the_same_trainer_goes_on_as_a_federated_round(
    keep: str, resume: bool, tmp_path: Path
) -> None:
    trained, trainer, evaluator = growing_weight()
    weight = trained[0].weight
    evaluator.state.best_metric, evaluator.state.best_metric_epoch = 0.5, 1  # no later epoch is better
    CheckpointHandler(str(tmp_path), *trained, evaluator, keep=keep, resume=resume).attach(trainer)
    seen = []
    for end in (1, 2, 3):
        with torch.no_grad():
            weight.fill_(10 * end)  # what the server sends
        trainer.run([0], max_epochs=end)
        seen.append(weight.item())
        assert torch.load(tmp_path / "last_epoch.pt", weights_only=True)["epoch"] == end
    assert seen == [11, 21, 31]
    assert float(torch.load(tmp_path / "model.pt", weights_only=True)["weight"]) == (11 if keep == "best" else 31)


def test_a_training_on_the_plan_of_another_names_its_own_cases(bundle: Path, data: Path, tmp_path: Path) -> None:
    """A site of a federated training, whose cases may have the names of another site's."""
    other = write_phantom_dataset(tmp_path / "other", training=4, evaluation=2, shape=(34, 32, 24))
    train(bundle, data, epochs=1)
    given = load_plan((bundle / "models" / "model.json").rename(tmp_path / "given.json"))
    shared = {"plan": f"$monai_iou.planning.load_plan('{tmp_path}/given.json')", "split_seed": 1, "overwrite": True}
    train(bundle, other, epochs=1, **shared)
    stored = load_plan(bundle / "models" / "model.json")
    own = BundleCases(str(other), val_fraction=0.25, split_seed=1).plan([16, 16, 16])
    assert set(own.trained) != set(given.trained)
    assert (stored.trained, stored.trained_images) == (own.trained, own.trained_images)
    state = torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)
    assert tuple(state["trained_images"]) == own.trained_images
    assert [state["data"]["images"][name] for name in own.trained] == list(own.trained_images)


@pytest.mark.parametrize("keys", [{"val_fraction": 0}, {"split_seed": 1}], ids=str)
def test_a_model_is_kept_on_other_data_as_long_as_nothing_is_trained_on_them(
    keys: dict[str, Any], bundle: Path, data: Path
) -> None:
    train(bundle, data, epochs=1)
    models = bundle / "models"
    (models / "postprocessing.json").write_text('{"min_size_mm3": [5.0]}', encoding="utf-8")
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in models.iterdir()}
    assert {"model.pt", "model.json", "postprocessing.json"} <= {*before}
    train(bundle, data, epochs=1, resume=True, overwrite=True, **keys)
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in models.iterdir()} == before
    train(bundle, data, epochs=2, resume=True, overwrite=True, val_interval=9, **keys)
    assert has_final_weights(bundle, 2), "that of its own, as the score was of other data"
    assert not (models / "postprocessing.json").exists()


def test_a_full_disk_leaves_the_model_with_its_plan(bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(bundle, data, epochs=1, pixdim=[1.0, 1.0, 1.5])
    models = bundle / "models"
    (models / "postprocessing.json").write_text("{}", encoding="utf-8")
    names = ("model.pt", "model.json", "postprocessing.json")
    before = [(models / name).read_bytes() for name in names]
    save = torch.save

    def fill(content: Any, stream: Any) -> None:
        if "optimizer" not in content and content:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(content, stream)

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(RuntimeError) as caught:
        train(bundle, data, epochs=1, pixdim=[2.0, 2.0, 2.0], overwrite=True)
    (sentence,) = {str(each) for each in causes(caught.value) if isinstance(each, TrainingError)}
    assert sentence.startswith(f"Expected room to write {models / 'model.pt'}, but the disk is full")
    assert [(models / name).read_bytes() for name in names] == before
