"""Mixed precision on a CPU: networks that compute again in the backward pass, and those of TorchScript."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import causes, overrides
from monai.inferers.inferer import SimpleInferer
from torch.utils.checkpoint import checkpoint

from monai_iou.bundle_files import copy_bundle
from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.demo import run_workflow
from monai_iou.workflow.engines import Trainer
from monai_iou.workflow.half_precision import CpuAutocast, SmallInFloat32


class Small(torch.nn.Module):
    """A network on images as small as its kernels, which may compute its second layer again in the backward pass."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv3d(1, 16, 3, padding=1), torch.nn.Conv3d(16, 16, 3, padding=1)
        for number, weights in enumerate(self.parameters()):
            with torch.no_grad():
                weights.copy_(torch.randn(weights.shape, generator=torch.Generator().manual_seed(number)))
        self.reentrant = reentrant

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        inner: torch.Tensor = self.first(image)
        output: torch.Tensor
        if self.reentrant is None:
            output = self.second(inner)
        else:
            output = checkpoint(self.second, inner, use_reentrant=self.reentrant)
        return output


def square(output: Any, *_: Any) -> torch.Tensor:
    first: torch.Tensor = output[0] if isinstance(output, list) else output
    return first.float().square().mean()


def small_image() -> torch.Tensor:
    return torch.randn(2, 1, 2, 2, 2, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_network_that_computes_again_in_the_backward_pass_has_the_right_gradients(reentrant: bool | None) -> None:
    exact, network = Small(), Small(reentrant)
    square(exact(small_image())).backward()
    trainer = Trainer(
        device=torch.device("cpu"), max_epochs=1, train_data_loader=[{"image": small_image(), "label": small_image()}],
        network=network, optimizer=torch.optim.SGD(network.parameters(), 0.0), loss_function=square, amp=True,
        inferer=SimpleInferer(),
    )  # fmt: skip
    held = [torch.full((size,), math.nan) for size in (1000, 10_000, 100_000)]
    del held
    trainer.run()
    assert trainer.amp
    for one, other in zip(network.parameters(), exact.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad - other.grad).norm() < 0.03 * other.grad.norm()


def test_a_backward_pass_with_arguments_is_as_without_the_mode() -> None:
    gradients = []
    for mode in (torch.enable_grad(), SmallInFloat32()):
        network = Small()
        output = network(small_image())
        with mode:
            output.backward(torch.ones_like(output), retain_graph=True)
            square(output).backward(inputs=[network.second.bias], retain_graph=True)
            square(output).backward()
            with pytest.raises(RuntimeError, match="implicitly created only for scalar"):
                network(small_image()).backward()
        gradients.append([weights.grad for weights in network.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused_in_a_training_in_bfloat16_on_a_cpu(nested: bool) -> None:
    script: Any = torch.jit.trace(Small(), small_image())
    network = torch.nn.Sequential(script) if nested else script
    inferer = CpuAutocast(SimpleInferer())
    with pytest.raises(
        ValueError, match=r"^Expected `amp` to be false in a training of a TorchScript network on a CPU"
    ):
        inferer(small_image(), network)
    with torch.no_grad():  # only gradients are wrong
        expected = Small()(small_image())
        assert (inferer(small_image(), network).float() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_network_trains_without_mixed_precision_and_is_refused_with_it(tmp_path: Path) -> None:
    data = write_phantom_dataset(tmp_path / "data", training=3, evaluation=1, shape=(32, 32, 24))
    bundle = copy_bundle(tmp_path / "bundle")
    torch.jit.trace(torch.nn.Conv3d(1, 2, 3, padding=1), torch.zeros(1, 1, 8, 8, 8)).save(tmp_path / "network.ts")
    given = {"network_def": f"$torch.jit.load({str(tmp_path / 'network.ts')!r})"}
    settings = {**overrides(bundle, data, epochs=1, val_interval=1), **given}
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, ["train"], {**settings, "amp": True})
    assert any("write --amp false, because torch computes wrong" in str(cause) for cause in causes(caught.value))
    run_workflow(bundle, ["train"], settings)
    assert (bundle / "models" / "model.pt").is_file()
