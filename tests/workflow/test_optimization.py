"""Averaged weights: the formula, validation, storing and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import overrides

from monai_iou.demo import run_workflow
from monai_iou.workflow.optimization import WeightAverage, averages_of, inner_module, is_parallel, load_averages
from monai_iou.workflow.settings import Settings

pytestmark = [pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")]


def test_the_average_is_that_of_its_formula() -> None:
    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    average = WeightAverage(layer, optimizer, 0.3)
    expected = layer.weight.detach().clone()
    for step in range(8):
        optimizer.zero_grad()
        layer(torch.ones(1, 2)).square().sum().backward()
        optimizer.step()
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach()
    torch.testing.assert_close(average.network.weight, expected)
    assert not average.network.weight.requires_grad


def test_a_step_that_a_fused_optimizer_skips_is_not_averaged() -> None:
    """It is told of infinite gradients and called all the same, where others are not called."""
    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    average = WeightAverage(layer, optimizer, 0.9)
    scaler = torch.amp.GradScaler("cpu")
    steps = []
    for number in (1.0, torch.inf, 1.0, torch.inf):
        optimizer.zero_grad()
        scaler.scale(layer(torch.full((1, 2), number)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append(average.steps)
    assert steps == [1, 1, 2, 2]


def test_averaged_weights_are_validated_stored_and_resumed(bundle: Path, data: Path) -> None:
    run_workflow(bundle, ["train"], overrides(bundle, data, ema_decay=0.9))
    last = torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)
    model = torch.load(bundle / "models" / "model.pt", weights_only=True)
    averaged = last["average"]["network"]
    assert last["best_metric_epoch"] in (1, 2)
    assert any(not torch.equal(averaged[name], value) for name, value in last["model"].items())
    if last["best_metric_epoch"] == 2:
        assert all(torch.equal(averaged[name], value) for name, value in model.items())
    resumed = run_workflow(bundle, ["train"], overrides(bundle, data, epochs=3, ema_decay=0.9, resume=True))
    average = resumed.parser.get_parsed_content("average")
    assert average.steps == 3 * last["average"]["steps"] // 2
    assert resumed.parser.get_parsed_content("validate#evaluator").network is average.network
    # the option changes nothing in evaluation: it reads the stored weights
    evaluated = run_workflow(bundle, ["train", "evaluate"], overrides(bundle, data, ema_decay=0.9))
    stored = torch.load(bundle / "models" / "model.pt", weights_only=True)
    network = evaluated.parser.get_parsed_content("validate#evaluator").network.state_dict()
    assert all(torch.equal(network[name], value) for name, value in stored.items())


@pytest.mark.parametrize("value", [0, 1, 1.5, "much", True])
def test_decays_that_no_average_can_have(value: object) -> None:
    with pytest.raises(ValueError, match="Expected `ema_decay` to be null or a number between 0 and 1, but got"):
        Settings(ema_decay=value)
    Settings(ema_decay="null")


def stepped(kind: type[torch.optim.Optimizer], **options: Any) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    layer = torch.nn.Linear(2, 1)
    optimizer = kind(layer.parameters(), lr=0.1, **options)  # type: ignore[call-arg]
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return layer, optimizer


SGD, AdamW = torch.optim.SGD, torch.optim.AdamW


@pytest.mark.parametrize(
    ("before", "now", "noted"),
    [
        ((SGD, {"momentum": 0.9}), (AdamW, {}), True),
        ((SGD, {"momentum": 0.9}), (AdamW, {}), False),
        ((SGD, {}), (AdamW, {}), True),
        ((AdamW, {}), (SGD, {"momentum": 0.9}), True),
        ((AdamW, {}), (AdamW, {"amsgrad": True}), True),
        ((AdamW, {}), (AdamW, {"amsgrad": True}), False),
    ],
)
def test_the_state_of_another_optimizer_is_refused_by_name(before: Any, now: Any, noted: bool) -> None:
    _, first = stepped(before[0], **before[1])
    state = averages_of(first) if noted else first.state_dict()
    second = now[0](torch.nn.Linear(2, 1).parameters(), lr=0.002, **now[1])
    with pytest.raises(ValueError, match=r"^Expected") as caught:
        load_averages(second, state, "models/last_epoch.pt")
    assert str(caught.value) == (
        "Expected models/last_epoch.pt to hold the state of this run's `optimizer`, but it is of another one: resume "
        "with the `optimizer` of the training and its options, or start anew with --overwrite and without --resume."
    )


class Factored(torch.optim.Optimizer):
    """Keeps other averages of matrices than of vectors, as Adafactor does."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for weights in self.param_groups[0]["params"]:
            state, name = self.state[weights], "rows" if weights.dim() > 1 else "all"
            if not state:
                state[name] = torch.zeros_like(weights)
            state[name].add_(weights.grad)


@pytest.mark.parametrize("noted", [True, False])
@pytest.mark.parametrize(
    ("kind", "before", "now"),
    [
        (AdamW, {}, {"weight_decay": 0.3}),
        (AdamW, {"amsgrad": True}, {"amsgrad": True}),
        (SGD, {}, {"momentum": 0.9}),
        (SGD, {"momentum": 0.9}, {"momentum": 0.5, "nesterov": True}),
        (Factored, {}, {}),
    ],
)
def test_a_state_that_fits_goes_on_with_the_optimizers_own_options(
    kind: Any, before: dict[str, Any], now: dict[str, Any], noted: bool
) -> None:
    _, first = stepped(kind, **before)
    state = averages_of(first) if noted else first.state_dict()  # those of earlier versions have no class
    layer = torch.nn.Linear(2, 1)
    second = kind(layer.parameters(), lr=0.002, **now)
    load_averages(second, state)
    assert all(second.param_groups[0][name] == value for name, value in {**now, "lr": 0.002}.items())
    found, expected = (list(each.state.values()) for each in (second, first))
    assert [sorted(each) for each in found] == [sorted(each) for each in expected]
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one if torch.is_tensor(one[name]))
    layer(torch.ones(1, 2)).sum().backward()
    second.step()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # what torch.compile imports
def test_the_network_is_found_in_all_that_torch_wraps_around_it() -> None:
    layer = torch.nn.Linear(2, 1)
    for wrapped in (
        layer,
        torch.nn.DataParallel(layer),
        torch.compile(layer),
        torch.compile(torch.nn.DataParallel(layer)),
        torch.nn.DataParallel(torch.compile(layer)),
    ):
        assert inner_module(wrapped) is layer
        assert not is_parallel(wrapped)
    assert inner_module(torch.nn.Sequential(layer))[0] is layer


@pytest.mark.parametrize(
    "net",
    [
        pytest.param({"_target_": "torch.nn.DataParallel", "module": "$@network_def.to(@device)"}, id="parallel"),
        pytest.param(
            "$torch.compile(@network_def.to(@device), backend='eager')", id="compiled", marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_the_weights_of_a_wrapped_network_are_stored_by_its_own_names(
    net: Any, ema_decay: float | None, bundle: Path, data: Path, tmp_path: Path
) -> None:
    trained = run_workflow(bundle, ["train"], overrides(bundle, data, epochs=1, net=net, ema_decay=ema_decay))
    stored = torch.load(bundle / "models" / "model.pt", weights_only=True)
    last = torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)
    names = trained.parser.get_parsed_content("network_def").state_dict().keys()
    assert stored.keys() == last["model"].keys() == names
    run_workflow(bundle, ["train", "evaluate"], overrides(bundle, data, output_dir=str(tmp_path)))
    assert (tmp_path / "metrics.csv").is_file()
