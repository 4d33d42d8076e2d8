"""The random transforms of a training on a GPU: the same patches as on a CPU, and how often they wait for the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import get_track_meta, set_track_meta
from monai.transforms import Compose, Randomizable
from torch import Tensor

from monai_iou.bundle_files import bundle_path
from monai_iou.transforms import RandAffineElasticd, RandCoarseElasticd
from tests.support.pretend_gpu import GPU, OnPretendGpu, pretended_gpu

ALWAYS = {"prob", "affine_prob", "elastic_prob"}


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Flips make MetaTensors, of which there can be none on a GPU that is not there."""
    tracked = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(tracked)


def parser(data: Path, **keys: Any) -> ConfigParser:
    found = ConfigParser(ConfigParser.load_config_file(bundle_path() / "configs" / "train.json"))
    found.update({"dataset_dir": str(data), "bundle_root": str(bundle_path()), "patch_size": [32, 32, 32], **keys})
    return found


def certain(transforms: list[Any]) -> list[Any]:
    """Let every change happen."""
    for each in transforms:
        for part in (each, *vars(each).values()):
            for name in ALWAYS & set(getattr(part, "__dict__", {})):
                setattr(part, name, 1.0)
    return transforms


def changed(transforms: list[Any], item: dict[str, Any]) -> dict[str, Tensor]:
    for place, each in enumerate(transforms):
        if isinstance(each, Randomizable):
            each.set_random_state(seed=place)
        with plain_tensors():
            item = each(item)
        item = item[0] if isinstance(item, list) else item
    return {key: item[key] for key in ("image", "label")}


def test_every_random_change_of_a_training_gives_on_a_gpu_what_it_gives_on_a_cpu(data: Path) -> None:
    seen = []
    for patch in ([32, 32, 32], [16, 16, 16]):
        keys = {"num_samples": 1, "flip_prob": 1.0, "patch_size": patch}
        on_cpu = parser(data, **keys)
        item = Compose(on_cpu.get_parsed_content("train#deterministic_transforms"))(
            on_cpu.get_parsed_content("cases").training[0]
        )
        expected = changed(certain(on_cpu.get_parsed_content("train#random_transforms")), item)
        on_gpu = parser(data, **keys, transform_device=GPU)
        transforms = certain(on_gpu.get_parsed_content("train#random_transforms"))
        with pretended_gpu() as waits:
            found = changed(transforms, item)
            for key, values in found.items():
                assert isinstance(values, OnPretendGpu), key
                torch.testing.assert_close(values.held, expected[key], rtol=0, atol=0)
        seen.append(dict(waits))
    # Two copies of the patch, two of the deformation, one of the noise; MONAI's smoothing asks for each sigma, its
    # contrast for a spread. Nothing asks more often of a larger patch.
    assert seen[0] == seen[1]
    assert sum(seen[0].values()) <= 12, seen


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [RandAffineElasticd, RandCoarseElasticd], ids=lambda kind: kind.__name__)
def test_a_deformation_copies_what_was_drawn_and_asks_at_most_for_large_labels(kind: Any, dtype: torch.dtype) -> None:
    common = {"mode": ["bilinear", "nearest"], "sigma_range": (3, 5), "magnitude_range": (20, 80)}
    certainly: dict[str, Any] = {"prob": 1.0}
    if kind is RandAffineElasticd:
        certainly = {
            "affine_prob": 1.0,
            "elastic_prob": 1.0,
            "rotate_range": (0.5, 0.5, 0.5),
            "shear_range": (0.1,) * 6,
        }
    generator = torch.Generator().manual_seed(0)
    item = {
        "image": torch.rand(2, 12, 10, 8, generator=generator),
        "label": torch.randint(0, 3, (1, 12, 10, 8), generator=generator).to(dtype),
    }
    expected = kind(["image", "label"], **common, **certainly).set_random_state(3)(item)
    deform = kind(["image", "label"], **common, **certainly).set_random_state(3)
    with pretended_gpu() as waits:
        there = {key: values.cuda() for key, values in item.items()}
        waits.clear()
        found = deform(there)
        assert waits.pop("to") <= 2, "the noise, and the affine map"
        assert sum(waits.values()) == (dtype == torch.int32), "whether float32 holds its labels"
    for key, values in found.items():
        assert values.dtype == expected[key].dtype
        assert values.device == GPU
        assert torch.equal(values.held, expected[key])


def test_the_pretended_gpu_refuses_what_a_gpu_refuses_and_counts_what_waits() -> None:
    with pretended_gpu() as waits:
        there = torch.ones(2, 3, device="cuda")
        assert there.device == (there * 2).sum().device == GPU
        assert waits == {}
        for wrong in (lambda: there + torch.ones(2, 3), lambda: torch.ones(6)[there.long().flatten()]):
            with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
                wrong()
        assert (there + torch.ones(())).device == GPU  # a number may come from the CPU
        assert there.sum().item() == 6.0
        assert there[there > 0].shape == (6,)
        assert there.cpu().device.type == "cpu"
        torch.bincount(there.long().flatten())
        there.long().flatten().repeat_interleave(there.long().flatten())
        assert torch.allclose(there, there)
        assert len(waits) == sum(waits.values()) == 6
