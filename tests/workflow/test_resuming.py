"""A training that is stopped and resumed ends with the weights of one that ran through, bit for bit."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundle_runs import overrides
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.transforms import Randomizable, Transform

from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.workflow.dataloader import BufferedLoader, StepSeeds, derive_seed
from monai_iou.workflow.engines import Trainer
from monai_iou.workflow.optimization import has_updated

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*os.fork:DeprecationWarning"),
]


class Draw(Randomizable, Transform):
    """Give what every kind of random number generator draws for an item."""

    def __call__(self, item: Any) -> list[float]:
        return [float(item), self.R.random(), float(np.random.rand())]  # noqa: NPY002


class Items(torch.utils.data.Dataset[Any]):
    def __init__(self, count: int = 7) -> None:
        self.count, self.draw = count, Draw()

    def __getitem__(self, index: int) -> Any:
        return self.draw(index)

    def __len__(self) -> int:
        return self.count


def batches(epoch: int, step: int = 0, workers: int = 0, seed: int = 3) -> list[list[list[float]]]:
    loader = BufferedLoader(
        Items(), seed=seed, shuffle=True, batch_size=2, drop_last=True, num_workers=workers,
        collate_fn=lambda items: items,
    )  # fmt: skip
    loader.begin(epoch, step)
    return list(loader)


def test_batches_depend_on_seed_epoch_and_place_alone() -> None:
    expected = batches(4)
    assert len(expected) == 3
    torch.rand(5)
    np.random.rand(5)  # noqa: NPY002
    assert batches(4) == expected
    assert batches(4, workers=2) == expected
    for step in range(1, 3):
        assert batches(4, step) == expected[step:]
    assert batches(5) != expected
    assert batches(4, seed=2) != expected
    drawn = [number for batch in expected for item in batch for number in item[1:]]
    assert len(set(drawn)) == len(drawn)


class Places(torch.utils.data.Dataset[Any]):
    """Give the GPU that is the current one where an item is made."""

    def __init__(self, gpu_of: dict[int, int]) -> None:
        self.gpu_of = gpu_of

    def __getitem__(self, index: int) -> int:
        return self.gpu_of.get(threading.get_ident(), 0)

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize("is_initialised", [True, False])
def test_batches_are_made_on_the_gpu_of_the_rank(is_initialised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current GPU is that of a thread, and a new thread begins with the first one."""
    gpu_of = {threading.get_ident(): 1}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_initialised)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: gpu_of.get(threading.get_ident(), 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: gpu_of.update({threading.get_ident(): gpu}))
    assert list(BufferedLoader(Places(gpu_of), collate_fn=list)) == [[int(is_initialised)]] * 3


def test_without_a_handler_epochs_count_up() -> None:
    loader = BufferedLoader(Items(), seed=3, shuffle=True, batch_size=2, drop_last=True, collate_fn=list)
    assert [list(loader) for _ in range(3)] == [batches(1), batches(2), batches(3)]
    assert loader.dataset[2][0] == 2


def test_a_sampler_of_ones_own_draws_the_same_order_again() -> None:
    def order(epoch: int) -> list[int]:
        sampler = torch.utils.data.WeightedRandomSampler([1.0] * 50, 50)
        loader = BufferedLoader(torch.arange(50), seed=1, sampler=sampler, batch_size=50)
        loader.begin(epoch)
        return next(iter(loader)).tolist()

    assert order(2) == order(2) != order(3)


def test_steps_seed_torch() -> None:
    from ignite.engine import Engine

    drawn: list[float] = []
    for first in (0, 2):
        engine = Engine(lambda *_: drawn.append(float(torch.rand(1))))
        engine.state.rank = 0
        StepSeeds(5, None).attach(engine)
        engine.add_event_handler(Events.STARTED, lambda engine, first=first: setattr(engine.state, "iteration", first))
        engine.run([0] * 4, max_epochs=1)
    assert drawn[2:4] == drawn[4:6]
    assert len({derive_seed(1, 2, rank) for rank in range(100)}) == 100


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom_dataset(tmp_path_factory.mktemp("data"), training=4, evaluation=2, shape=(32, 32, 24))


def train(bundle: Path, data: Path, stop: int | None = None, **changes: Any) -> dict[str, Any]:
    """Train to the end, or until the process dies in step `stop`; return the last checkpoint."""
    settings = {"batch_size": 1, "val_fraction": 0.25, "epochs": 3, "ema_decay": 0.9, **changes}
    network = {"network_def#dropout": 0.2}
    made = ConfigWorkflow(
        config_file=str(bundle / "configs" / "train.json"), workflow_type="train",
        **overrides(bundle, data, **settings, **network),
    )  # fmt: skip
    made.initialize()
    trainer = made.parser.get_parsed_content("train#trainer")
    if stop is not None:

        @trainer.on(Events.ITERATION_COMPLETED(once=stop))
        def die() -> None:
            if changes.get("kill"):
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGTERM)

        with pytest.raises((SystemExit, KeyboardInterrupt)):
            made.run()
    else:
        made.run()
    return torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)


def test_a_stopped_and_resumed_training_ends_with_the_same_weights(bundle: Path, data: Path) -> None:
    whole = train(bundle, data)
    # SIGTERM inside the first epoch, at the end of the second, and a crash inside the third, which loses its steps.
    train(bundle, data, stop=2)
    train(bundle, data, stop=6, resume=True)
    train(bundle, data, stop=8, resume=True, kill=True)
    resumed = train(bundle, data, resume=True, num_workers=1)
    assert (resumed["epoch"], resumed["best_metric"]) == (3, whole["best_metric"])
    for key, value in whole["model"].items():
        assert torch.equal(resumed["model"][key], value), key
    for key, value in whole["average"]["network"].items():
        assert torch.equal(resumed["average"]["network"][key], value), key


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # MONAI's handler counts each
def test_a_training_that_sums_gradients_is_stopped_between_two_updates(bundle: Path, data: Path) -> None:
    """MONAI's `accumulation_steps`: the sum of an update that is not complete is in no checkpoint."""
    changes = {"train#trainer#accumulation_steps": 2, "val_fraction": 0, "batch_size": 1, "epochs": 2}  # 4 steps each
    whole = train(bundle, data, **changes)
    train(bundle, data, stop=4, **changes)  # seen in the next step, after which half of a sum is there
    stopped = torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)
    assert (stopped["epoch"], stopped["step"]) == (1, 2)
    resumed = train(bundle, data, resume=True, **changes)
    for key, value in whole["model"].items():
        assert torch.equal(resumed["model"][key], value), key


@pytest.mark.parametrize(("steps", "between"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (3, [3, 5]), (7, [5])])
def test_an_update_ends_with_its_steps_or_with_the_epoch(steps: int, between: list[int]) -> None:
    """As MONAI's trainer counts them, in each epoch anew."""
    updated: list[int] = []
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: updated.append(trainer.state.iteration))
    batch = {"image": torch.ones(1, 1), "label": torch.ones(1, 1)}
    trainer = Trainer(
        device=torch.device("cpu"), max_epochs=2, train_data_loader=[batch] * 5,
        network=layer, optimizer=optimizer, loss_function=torch.nn.MSELoss(), accumulation_steps=steps,
    )  # fmt: skip
    found: list[int] = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def note() -> None:
        found.extend([trainer.state.iteration] if has_updated(trainer) else [])

    trainer.run()
    assert found == updated == [*between, *(step + 5 for step in between)]


def test_workers_that_are_threads_are_refused() -> None:
    for dataset in (Items(), torch.utils.data.ChainDataset([])):
        with pytest.raises(ValueError, match=r"^Expected `use_thread_workers`") as caught:
            BufferedLoader(dataset, batch_size=2, num_workers=2, use_thread_workers=True)
        assert str(caught.value) == (
            "Expected `use_thread_workers` to be false, but got True: leave it out, as threads would share the random "
            "transforms and crop an image and its label at different places; `num_workers` starts processes."
        )
    assert len(list(BufferedLoader(Items(), batch_size=7, use_thread_workers=False, collate_fn=list))) == 1
