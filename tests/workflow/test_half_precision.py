"""Mixed precision: its data type on each device, and networks whose numbers are too large for float16."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import causes, overrides
from gloo_ranks import join_group, leave_group, run_ranks
from monai.inferers.inferer import SimpleInferer, SlidingWindowInferer
from torch.nn.parallel import DistributedDataParallel

from monai_iou.bundle_files import copy_bundle
from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.demo import run_workflow
from monai_iou.workflow.half_precision import CpuAutocast, FullPrecisionFallback, amp_type_of

HALF = ("cpu", torch.float16)


class Large(torch.nn.Module):
    """A network with sums above 65504 before it normalises them, as residual units have after some training."""

    def __init__(self, norm: type[torch.nn.Module] = torch.nn.InstanceNorm3d, gain: float = 1e6) -> None:
        super().__init__()
        self.first, self.norm, self.last = torch.nn.Conv3d(1, 4, 3, padding=1), norm(4), torch.nn.Conv3d(4, 2, 1)
        with torch.no_grad():
            self.first.weight.copy_(torch.randn(self.first.weight.shape, generator=torch.Generator().manual_seed(0)))
            self.first.weight *= gain
        self.calls: list[torch.dtype] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.last(self.norm(self.first(image)))
        self.calls.append(output.dtype)
        return output


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float16")])
def test_the_type_of_a_gpu_is_the_one_in_which_it_computes(
    native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or torch.no_grad())  # type: ignore[func-returns-value]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native and not including_emulation)
    assert amp_type_of("cuda:1") == amp_type_of(torch.device("cuda", 1)) == expected
    assert asked == [torch.device("cuda", 1)] * 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert amp_type_of("cuda:1") == "bfloat16"


@pytest.mark.parametrize(
    "inferer", [SimpleInferer(), SlidingWindowInferer((8, 8, 8), sw_batch_size=2)], ids=["patch", "windows"]
)
@pytest.mark.parametrize("training", [True, False])
def test_an_overflow_is_computed_again_as_without_mixed_precision(
    inferer: Any, training: bool, image: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    network = Large().train(training)
    exact = inferer(image, network)
    fallback = FullPrecisionFallback(inferer)
    with torch.autocast(*HALF), caplog.at_level(logging.WARNING):
        assert not inferer(image, network).isfinite().all()
        network.calls.clear()
        found = [fallback(image, network) for _ in range(2)]
        assert network.calls == [torch.float16, torch.float32] * 2
    assert all(torch.equal(output, exact) for output in found)
    assert [record.getMessage() for record in caplog.records] == [
        "The network's output is too large for float16 and was computed again in float32, which takes more time. Later "
        "outputs that are too large are computed again without another message: set `amp_dtype` to bfloat16 if the GPU "
        "computes in it, otherwise `amp` to false."
    ]
    found[0].sum().backward()
    assert all(bool(weights.grad.isfinite().all()) for weights in network.parameters() if weights.grad is not None)


@pytest.mark.parametrize(
    ("dtype", "gain", "value", "calls"),
    [
        (torch.float16, 1.0, 1.0, [torch.float16]),  # nothing is too large
        (torch.bfloat16, 1e6, 1.0, [torch.bfloat16]),
        (None, 1e6, 1.0, [torch.float32]),
        (torch.float16, 1.0, math.nan, [torch.float16]),  # of which float32 makes NaN as well
    ],
)
def test_no_other_output_is_computed_twice(
    dtype: torch.dtype | None, gain: float, value: float, calls: list[torch.dtype], image: torch.Tensor
) -> None:
    network = Large(gain=gain)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        FullPrecisionFallback(SimpleInferer())(image * value, network)
    assert network.calls == calls


def test_all_outputs_of_a_list_are_looked_at(image: torch.Tensor) -> None:
    network = Large()

    def both(image: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return torch.zeros(1), [torch.zeros(1), network(image)]  # as with attention maps

    with torch.autocast(*HALF):
        output = FullPrecisionFallback(SimpleInferer())(image, both)
        named = FullPrecisionFallback(SimpleInferer())(image, lambda image: {"main": network(image)})
    assert output[1][1].isfinite().all()
    assert named["main"].isfinite().all()


def test_running_statistics_are_those_of_the_second_computation(image: torch.Tensor) -> None:
    network, other = Large(torch.nn.BatchNorm3d), Large(torch.nn.BatchNorm3d)
    other.load_state_dict(network.state_dict())
    with torch.autocast(*HALF):
        FullPrecisionFallback(SimpleInferer())(image, network)
    other(image)
    assert len(list(network.buffers())) == 3
    assert all(torch.equal(*pair) for pair in zip(network.buffers(), other.buffers(), strict=True))


def train_on_rank(rank: int, folder: str) -> None:
    """Rank 1 alone has an image that overflows; batch statistics are sent to all ranks before each computation."""
    join_group(rank, 2, folder)
    network = Large(torch.nn.BatchNorm3d, gain=1.0)
    for weights in network.parameters():
        torch.nn.init.constant_(weights, 0.1)
    shared = DistributedDataParallel(network)
    fallback = FullPrecisionFallback(SimpleInferer())
    for value in (1.0, 6e4 if rank else 1.0, 1.0):
        image = torch.full((1, 1, 4, 4, 4), value)
        image[..., 0] = 0
        with torch.autocast(*HALF):
            output = fallback(image, shared)
        shared.zero_grad()
        output.float().square().sum().backward()
    gradient = [weights.grad for weights in network.parameters()]
    torch.save(
        {"calls": network.calls, "gradient": gradient, "buffers": list(network.buffers())}, f"{folder}/{rank}.pt"
    )
    leave_group()


def test_all_ranks_compute_again_where_one_has_to(tmp_path: Path) -> None:
    run_ranks(train_on_rank, 2, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["calls"] == second["calls"] == [torch.float16, torch.float16, torch.float32, torch.float16]
    for mine, other in zip(first["gradient"], second["gradient"], strict=True):
        assert mine.isfinite().all()
        assert torch.equal(mine, other)
    assert all(buffer.isfinite().all() for buffer in (*first["buffers"], *second["buffers"]))


def test_the_bundle_trains_validates_and_segments_with_numbers_too_large_for_float16(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU, MONAI's engines do not turn on mixed precision: it is on around them."""
    data = write_phantom_dataset(tmp_path / "data", training=3, evaluation=1, shape=(32, 32, 24))
    bundle = copy_bundle(tmp_path / "bundle")
    network = {"network_def": {"_target_": "test_half_precision.Large"}, "amp_dtype": "float16"}
    with torch.autocast(*HALF):
        run_workflow(bundle, ["train"], {**overrides(bundle, data, epochs=2, val_interval=1), **network})
        masks = {"bundle_root": str(bundle), "dataset_dir": str(data), "output_dir": str(tmp_path / "masks"), **network}
        run_workflow(bundle, ["inference"], masks)
    assert capsys.readouterr().out.count("is too large for float16") == 3  # trainer, validation, inference
    assert (bundle / "models" / "model.pt").is_file()
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["phantom_03.nii.gz"]


class Noting(torch.nn.Module):
    """A network that notes the types of its outputs."""

    types: set[torch.dtype] = set()  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layer(image)
        Noting.types.add(output.dtype)
        return output


@pytest.mark.parametrize("amp", [True, False])
def test_mixed_precision_on_a_cpu(amp: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_phantom_dataset(tmp_path / "data", training=3, evaluation=1, shape=(32, 32, 24))
    bundle = copy_bundle(tmp_path / "bundle")
    given = {"network_def": {"_target_": "test_half_precision.Noting"}, "amp": amp}
    masks = {"bundle_root": str(bundle), "dataset_dir": str(data), "output_dir": str(tmp_path / "masks"), **given}
    settings = {**overrides(bundle, data, epochs=1, val_interval=1), **given}
    for configs, values in ((["train"], settings), (["inference"], masks), (["train", "evaluate"], settings)):
        monkeypatch.setattr(Noting, "types", set())
        run_workflow(bundle, configs, values)
        # Of a network of the user's, the training looks at an output before it begins.
        assert Noting.types - {torch.float32} == ({torch.bfloat16} if amp else set()), configs
    weights = torch.load(bundle / "models" / "model.pt", weights_only=True)
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_mixed_precision_on_a_cpu_is_bfloat16(tmp_path: Path) -> None:
    data = write_phantom_dataset(tmp_path / "data", training=3, evaluation=1, shape=(32, 32, 24))
    bundle = copy_bundle(tmp_path / "bundle")
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, ["train"], overrides(bundle, data, amp=True, amp_dtype="float16"))
    message = "Expected `amp_dtype` to be bfloat16 on a CPU, but got float16: write --amp_dtype bfloat16."
    assert message in {str(cause) for cause in causes(caught.value)}
    assert [path.name for path in (bundle / "models").iterdir()] == [".monai_iou.lock"]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (torch.nn.Conv3d(16, 16, 3, padding=1), (2, 4, 4)),
        (torch.nn.Conv3d(16, 16, 3, padding=1), (2, 2, 2)),
        (torch.nn.Conv3d(16, 16, 3, stride=2, padding=1), (1, 1, 1)),
        (torch.nn.Conv3d(16, 16, 3, stride=2, padding=1), (4, 4, 1)),
        (torch.nn.Conv3d(16, 16, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)), (2, 2, 1)),
        (torch.nn.Conv2d(16, 16, 3, stride=2, padding=1), (4, 1)),
        (torch.nn.Conv3d(16, 16, 3, padding=1), (4, 5, 8)),  # large enough to compute in bfloat16
    ],
    ids=str,
)
def test_gradients_of_small_images_are_right_in_bfloat16_on_a_cpu(
    layer: torch.nn.Module, shape: tuple[int, ...]
) -> None:
    """torch's own, of the kernel, are what the memory held before."""
    image = torch.randn(2, 16, *shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = [image, *layer.parameters()]
    exact = layer(image)
    pull = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(exact, weights, pull)
    for _ in range(3):
        held = [torch.full((size,), math.nan) for size in (1000, 10_000, 100_000)]
        del held
        output = CpuAutocast(SimpleInferer())(image, layer)
        assert output.dtype == torch.bfloat16
        for one, other in zip(torch.autograd.grad(output, weights, pull.bfloat16()), expected, strict=True):
            assert (one - other).norm() < 0.03 * other.norm()
