"""Where voxels are read, on devices whose products of matrices are coarse or have no float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from monai_iou.transforms import RandAffineElasticd, RandCoarseElasticd
from monai_iou.transforms.warping import FLOAT32_WHOLE, WarpTransform, exact_dtype, sampling_grid
from tests.support.pretend_apple import PretendedApple

SIZE = (96, 80, 64)
CHANCES: dict[Any, dict[str, Any]] = {
    RandAffineElasticd: {
        "affine_prob": 1.0,
        "elastic_prob": 1.0,
        "rotate_range": [0.5] * 3,
        "sigma_range": (3, 5),
        "magnitude_range": (20, 80),
    },
    RandCoarseElasticd: {"prob": 1.0, "sigma_range": (3, 5), "magnitude_range": (20, 80)},
}


class Tf32(TorchFunctionMode):
    """Round what is multiplied in float32 to 10 bits behind the first, as a GPU does with TF32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__}:
            args = [rounded(each) if each.dtype == torch.float32 else each for each in args]
        return func(*args, **(kwargs or {}))


def rounded(values: Tensor) -> Tensor:
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def places_of(transform: WarpTransform) -> Tensor:
    """Return where all voxels are read, in voxels."""
    cpu = torch.device("cpu")
    grid = sampling_grid(transform._places(SIZE, cpu), SIZE, align_corners=True)
    return grid * torch.tensor([length - 1 for length in reversed(SIZE)]) / 2


def drawn(kind: Any) -> WarpTransform:
    transform: WarpTransform = kind("image", **CHANCES[kind]).set_random_state(0)
    transform.randomize(None)  # type: ignore[attr-defined]
    return transform


def allow(precision: str, monkeypatch: pytest.MonkeyPatch, *, newer: bool = True) -> None:
    """Let torch say that it may round products: by its newer option, or as torch 2.8 does."""
    option = SimpleNamespace(matmul=SimpleNamespace(fp32_precision=precision)) if newer else SimpleNamespace()
    monkeypatch.setattr(torch.backends, "mkldnn", option)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high" if precision == "tf32" else "highest")


@pytest.mark.parametrize("newer", [False, True], ids=["torch 2.8", "newer option"])
@pytest.mark.parametrize("kind", CHANCES, ids=lambda kind: kind.__name__)
def test_tf32_moves_no_voxel(kind: Any, newer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = places_of(drawn(kind))
    with Tf32():
        assert (places_of(drawn(kind)) - expected).abs().max() > 0.02, "the pretended GPU rounds"
        allow("tf32", monkeypatch, newer=newer)
        found = places_of(drawn(kind))
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-4


def test_products_without_tf32_stay_in_float32_and_apples_gpus_have_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = torch.ones(2)
    assert exact_dtype(values) == torch.float32
    for newer in (False, True):
        allow("ieee", monkeypatch, newer=newer)
        assert exact_dtype(values) == torch.float32
    for precision in ("bf16", "tf32"):
        allow(precision, monkeypatch)
        assert exact_dtype(values) == torch.float64
    with PretendedApple():
        assert exact_dtype(values) == torch.float32


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint32, torch.int64], ids=str)
def test_labels_that_float32_does_not_hold_are_read_as_they_are(dtype: torch.dtype) -> None:
    label = torch.full((1, 4, 4, 4), FLOAT32_WHOLE + 1).to(dtype)
    deform = RandCoarseElasticd("label", (3, 5), (20, 80), prob=1.0, mode="nearest").set_random_state(0)
    assert torch.equal(deform({"label": label})["label"].long(), label.long())
