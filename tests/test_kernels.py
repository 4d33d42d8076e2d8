"""Every kernel of the voxel pass against the specification: autograd through the reference in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from monai_iou.voxels import kernels, tiled
from monai_iou.voxels.reference import PassSpec, Voxels
from monai_iou.voxels.reference import sums as reference_sums
from monai_iou.voxels.sums import flatten_voxels

# Relative errors of sums and, against the largest entry, of gradients, by the logits' dtype.
TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (1e-5, 2e-3),
    torch.bfloat16: (1e-5, 1e-2),
}
SHAPES = [(1, 2, 1, 1, 1), (3, 7, 5, 1, 9), (2, 41, 17, 13), (2, 3, 77), (1, 1, 6, 5), (0, 3, 4, 4)]
SPECS = [
    PassSpec(activation, overlap, power, cross_entropy, focal, smoothing, confidence)
    for activation, (overlap, power), (cross_entropy, focal, smoothing), confidence in itertools.product(
        ("softmax", "sigmoid", None),
        (("product", 1.0), ("product", 2.0), ("product", 1.5), ("min_max", 1.0), (None, 1.0)),
        ((False, 0.0, 0.0), (True, 0.0, 0.0), (True, 2.0, 0.1), (True, 1.5, 0.0)),
        (False, True),
    )
    if (overlap is not None or cross_entropy) and not (overlap is None and confidence)
]
CORE = [
    PassSpec(),
    PassSpec(cross_entropy=True),
    PassSpec("sigmoid", "min_max", cross_entropy=True, focal=2.0, label_smoothing=0.1),
    PassSpec("softmax", None, cross_entropy=True, focal=1.5),
    PassSpec(None, "product", 2.0, confidence=True),
]


def case(
    shape: tuple[int, ...], spec: PassSpec, *, ignore: bool = False, soft: bool = False, groups: bool = False
) -> Voxels:
    """Random float64 voxels; logits are probabilities where the pass applies no activation."""
    generator = torch.Generator().manual_seed(len(shape) + shape[1])
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    if spec.activation is None:
        logits = logits.sigmoid()
    flat = (shape[0], 1, *shape[2:])
    soft = soft or shape[1] == 1
    target = torch.rand(shape, generator=generator) if soft else torch.randint(0, shape[1], flat, generator=generator)
    mask = torch.rand(flat, generator=generator) > 0.3 if ignore else None
    regions = torch.randint(-1, 3, flat, generator=generator) if groups else None
    return flatten_voxels(logits, target, None, mask, regions, 3 if groups else None)


def run(kernel: kernels.Kernel, voxels: Voxels, spec: PassSpec) -> tuple[Tensor, Tensor]:
    """Return the sums and the gradient of a random projection of them."""
    leaf = voxels.logits.detach().requires_grad_()
    rows = kernel(replace(voxels, logits=leaf), spec)
    generator = torch.Generator().manual_seed(1)
    pull = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows)
    (gradient,) = torch.autograd.grad(rows, leaf, pull)
    return rows.detach(), gradient


def assert_close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    rows, gradient = TOLERANCE[dtype]
    assert found[1].dtype == dtype
    torch.testing.assert_close(found[0].double(), expected[0].double(), rtol=rows, atol=rows)
    scale = max(1.0, expected[1].abs().max().item() if expected[1].numel() else 0.0)
    torch.testing.assert_close(found[1].double(), expected[1].double(), rtol=gradient, atol=gradient * scale)


@pytest.fixture
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiled.TILE_ELEMENTS, "cpu", 7)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_tiled_equals_reference_in_every_branch(spec: PassSpec) -> None:
    for ignore, soft, groups in itertools.product((False, True), repeat=3):
        voxels = case((2, 3, 5, 3), spec, ignore=ignore, soft=soft, groups=groups)
        assert_close(run(tiled.sums, voxels, spec), run(reference_sums, voxels, spec), torch.float64)
