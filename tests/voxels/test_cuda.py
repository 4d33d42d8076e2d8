"""What only a GPU can show of the kernels: skipped, saying so, where there is none."""

from __future__ import annotations

import gc
import importlib.util
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.inferers.inferer import SimpleInferer
from torch import Tensor

from monai_iou import (
    FocalTverskyLoss,
    InstanceIoULoss,
    IoUCELoss,
    IoULoss,
    LovaszSoftmaxLoss,
    MultiScaleLoss,
    kernel_report,
    use_kernel,
    voxel_sums,
)
from monai_iou.bundle_files import bundle_path
from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.voxels import late_checks
from monai_iou.workflow.half_precision import FullPrecisionFallback, amp_type_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

KERNELS = [
    "tiled",
    pytest.param(
        "triton", marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
    ),
]
SHAPES = [(1, 2, 1, 1, 1), (3, 7, 5, 1, 9), (2, 41, 17, 13), (2, 1, 6, 5), (1, 118, 9), (1, 256, 3), (1, 5, 40, 40, 40)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _no_answer_on_its_way() -> None:
    torch.cuda.synchronize()
    late_checks._alone._questions.clear()
    gc.collect()
    torch.cuda.empty_cache()


def passed(kernel: str, logits: Tensor, target: Tensor, activation: str | None) -> tuple[Tensor, Tensor]:
    """Return the sums and the gradient of a random projection of them."""
    leaf = logits.detach().requires_grad_()
    with use_kernel(kernel):
        rows = voxel_sums(leaf, target, activation=activation, gamma=1.5, label_smoothing=0.1, confidence=True).rows
        pull = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(rows)
        (gradient,) = torch.autograd.grad(rows, leaf, pull)
    return rows.detach(), gradient


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_against_float64_on_a_cpu_twice_with_the_same_bits(
    shape: tuple[int, ...], activation: str | None, kernel: str
) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    logits = torch.randn(shape, generator=generator) * 3
    logits = logits if activation else (logits / 3).sigmoid()  # 1 / p of a smaller p is beyond float16
    flat = (shape[0], 1, *shape[2:])
    labels = torch.randint(0, shape[1], flat, generator=generator)
    for dtype, limit in TOLERANCE.items():
        for target in (torch.rand(shape, generator=generator), *([labels] if shape[1] > 1 else [])):
            rounded = logits.to(dtype)
            exact = passed("reference", rounded.double(), target, activation)
            found = passed(kernel, rounded.cuda(), target.cuda(), activation)
            again = passed(kernel, rounded.cuda(), target.cuda(), activation)
            assert all(torch.equal(first, second) for first, second in zip(found, again, strict=True))
            torch.testing.assert_close(found[0].cpu().double(), exact[0], rtol=1e-5, atol=1e-5)
            scale = max(1.0, exact[1].abs().max().item())
            torch.testing.assert_close(found[1].cpu().double(), exact[1], rtol=limit, atol=limit * scale)


@pytest.mark.parametrize("kernel", KERNELS)
def test_wrong_labels_are_named_by_the_next_call_and_the_process_lives_on(kernel: str) -> None:
    loss = IoUCELoss(softmax=True)
    logits = torch.randn(1, 3, 8, 8, 8, device="cuda", requires_grad=True)
    good = torch.zeros(1, 1, 8, 8, 8, dtype=torch.long, device="cuda")
    bad = good.clone()
    bad[..., 0] = 7
    with use_kernel(kernel):
        assert math.isnan(loss(logits, bad).item())
        with pytest.raises(ValueError, match="7"):
            loss(logits, good)
        value = loss(logits, good)
        value.backward()
        torch.cuda.synchronize()
    assert math.isfinite(value.item())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "loss", [IoULoss(softmax=True), IoUCELoss(softmax=True), LovaszSoftmaxLoss(softmax=True)], ids=str
)
def test_half_precision_at_128_cubed_is_finite(kernel: str, loss: torch.nn.Module) -> None:
    logits = (torch.randn(1, 2, 128, 128, 128, device="cuda") * 30).half().requires_grad_()
    labels = torch.zeros(1, 1, 128, 128, 128, dtype=torch.uint8, device="cuda")
    labels[..., :2, :2, :2] = 1
    with use_kernel(kernel):
        value = loss(logits, labels)
        value.backward()
    assert math.isfinite(value.item())
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_changes_nothing(kernel: str) -> None:
    logits = torch.randn(1, 4, 20, 20, 20, device="cuda")
    labels = torch.randint(0, 4, (1, 1, 20, 20, 20), device="cuda")
    loss = IoUCELoss(softmax=True)
    with use_kernel(kernel):
        plain = loss(logits, labels)
        for dtype in (torch.float16, torch.bfloat16):
            with torch.autocast("cuda", dtype):
                assert torch.equal(loss(logits, labels), plain)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("loss", [IoULoss(softmax=True), IoUCELoss(softmax=True)], ids=str)
def test_peak_memory_is_the_gradient_and_little_more(
    kernel: str, memory_format: torch.memory_format, loss: torch.nn.Module
) -> None:
    logits = torch.randn(1, 14, 192, 192, 192, device="cuda").bfloat16().contiguous(memory_format=memory_format)
    logits.requires_grad_()
    labels = torch.randint(0, 14, (1, 1, 192, 192, 192), device="cuda").to(torch.uint8)
    with use_kernel(kernel):
        loss(logits, labels).backward()  # compiles
        logits.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss(logits, labels).backward()
        torch.cuda.synchronize()
    # The tiled kernel's tiles are of one size however large the volume is.
    tiles = 0 if kernel == "triton" else 16 * 4 * 2**22
    assert torch.cuda.max_memory_allocated() - before <= 1.15 * logits.nbytes + tiles


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "loss",
    [
        IoULoss(softmax=True, ignore_index=2),
        IoUCELoss(softmax=True, batch=True, weight=[1.0, 2.0, 3.0]).cuda() if torch.cuda.is_available() else None,
        LovaszSoftmaxLoss(softmax=True),
        InstanceIoULoss(softmax=True, max_regions=4),
    ],
    ids=["ignored", "weights", "Lovasz", "regions"],
)
def test_a_captured_step_follows_its_inputs(kernel: str, loss: torch.nn.Module) -> None:
    logits = torch.randn(2, 3, 20, 20, 20, device="cuda", requires_grad=True)
    channels = 3 if isinstance(loss, InstanceIoULoss) else 1  # a label map, and the regions of two classes
    labels = torch.randint(0, 3, (2, channels, 20, 20, 20), device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        value = loss(logits, labels)
        return value, torch.autograd.grad(value, logits)[0]

    with use_kernel(kernel):
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for wrong in (False, True):
            with torch.no_grad():
                logits.copy_(torch.randn_like(logits))
                labels.copy_(torch.randint_like(labels, 3))
                labels[0, 0, 0, 0, 0] = 7 if wrong else 0
            graph.replay()
            torch.cuda.synchronize()
            if wrong:
                assert math.isnan(captured[0].item())
            else:
                for found, expected in zip(captured, step(), strict=True):
                    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kernel", ["auto", *KERNELS])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "loss",
    [
        IoULoss(softmax=True),
        IoULoss(softmax=True, ignore_index=2),
        IoUCELoss(softmax=True, batch=True),
        FocalTverskyLoss(softmax=True),
        LovaszSoftmaxLoss(softmax=True),
        MultiScaleLoss(IoUCELoss(softmax=True)),
    ],
    ids=["IoU", "ignored", "IoU and CE", "Tversky", "Lovasz", "scales"],
)
def test_a_loss_never_waits_for_the_gpu(loss: torch.nn.Module, dtype: torch.dtype, kernel: str) -> None:
    logits = torch.randn(2, 3, 24, 24, 24, device="cuda", requires_grad=True)
    labels = torch.randint(0, 3, (2, 1, 24, 24, 24), device="cuda").to(dtype)
    mode = torch.cuda.get_sync_debug_mode()
    with use_kernel(kernel):
        for setting in (mode, "error"):  # the first call compiles, and checks the kernel
            torch.cuda.set_sync_debug_mode(setting)
            try:
                torch.autograd.grad(loss(logits, labels), logits)
            finally:
                torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_default_kernel_is_triton_without_a_warning() -> None:
    loss = IoUCELoss(softmax=True)
    logits = torch.randn(1, 3, 24, 24, 24, device="cuda")
    labels = torch.randint(0, 3, (1, 1, 24, 24, 24), device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = loss(logits, labels)
    assert kernel_report()["cuda:0"].startswith("triton: it agreed with the reference in ")
    with use_kernel("triton"):
        assert torch.equal(found, loss(logits, labels))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("kind", ["soft maps", "one channel", "labels"])
def test_tritons_kernel_passes_its_check_for_every_kind_of_input(
    kind: str, memory_format: torch.memory_format, dtype: torch.dtype, masked: bool
) -> None:
    logits = torch.randn(2, 1 if kind == "one channel" else 3, 24, 20, 12, device="cuda").to(dtype)
    logits = logits.contiguous(memory_format=memory_format)
    labels = torch.randint(0, 2, (2, 1, 24, 20, 12), device="cuda")
    target = torch.rand_like(logits) if kind == "soft maps" else labels
    options: dict[str, Any] = {"activation": "sigmoid" if kind == "one channel" else "softmax"}
    options |= {"overlap": "min_max"} if kind == "soft maps" else {}
    mask = torch.rand_like(labels, dtype=torch.float32) > 0.3 if masked else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        voxel_sums(logits, target, mask=mask, **options)
    assert kernel_report()["cuda:0"].startswith("triton: it agreed with the reference in ")


@pytest.mark.parametrize(
    "settings",
    [
        {"patch_size": [32, 32, 24]},
        {"patch_size": [48, 48, 14], "pixdim": [1, 1, 3.3]},
        {"patch_size": [32, 32, 24], "amp_dtype": "float16"},
    ],
)
def test_the_bundle_changes_patches_on_the_gpu_and_trains(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Also with thick slices, whose network halves its axes at different levels, and with each type of precision."""
    from monai.bundle import ConfigWorkflow

    data = write_phantom_dataset(tmp_path / "dataset", training=4, evaluation=0, shape=(48, 48, 48))
    places = {"dataset_dir": str(data), "ckpt_dir": str(tmp_path / "models"), "output_dir": str(tmp_path / "eval")}
    length = {"base_channels": 4, "epochs": 8, "case_repeats": 4, "val_fraction": 0}
    workflow = ConfigWorkflow(
        config_file=str(bundle_path() / "configs" / "train.json"), workflow_type="train", logging_file=False,
        **places, **length, **settings,
    )  # fmt: skip
    workflow.initialize()
    loader = workflow.parser.get_parsed_content("train#dataloader")
    batch = next(iter(loader))
    assert batch["image"].is_cuda
    assert batch["label"].is_cuda
    trainer = workflow.parser.get_parsed_content("train#trainer")
    losses: list[float] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: losses.append(float(engine.state.output[0]["loss"]))
    )
    workflow.run()
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-8:]) < sum(losses[:8])


def test_an_output_too_large_for_float16_is_computed_again() -> None:
    layer = torch.nn.Conv3d(1, 2, 1, device="cuda")
    image = torch.rand(1, 1, 8, 8, 8, device="cuda") + 1
    fallback = FullPrecisionFallback(SimpleInferer())
    with torch.no_grad():
        layer.weight.fill_(6e4)
    assert amp_type_of("cuda") == ("bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float16")
    with torch.autocast("cuda", torch.float16):
        assert not layer(image).isfinite().all()
        found = fallback(image, layer)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, 6e4 * image + layer.bias.view(1, 2, 1, 1, 1), rtol=1e-3, atol=0)  # with TF32
