"""The memory of this machine, and the memory that a training step takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from monai_iou.bundle_files import bundle_path
from monai_iou.planning.plan import Plan
from monai_iou.volumes.memory import free_memory

__all__ = ["Machine", "detect_hardware", "training_bytes"]


GIB = 2**30
# Ratio of the memory of a step to that of the tensors kept for backward, from steps on a CPU: it covers gradients,
# copies that convolutions make, and the allocator.
STEP_OVERHEAD = 3.0
BYTES_PER_PARAMETER = 16  # weight, gradient and AdamW's two averages, float32


@dataclass(frozen=True)
class Machine:
    """The machine that training is to run on.

    Attributes:
        device: "cuda" or "cpu".
        step_bytes: memory for a training step: nine tenths of the GPU's free memory, or half of the free RAM.
        cache_bytes: RAM for prepared volumes, half of the free RAM.
        source: origin of the first number, as text for the reasons.
    """

    device: str
    step_bytes: int
    cache_bytes: int
    source: str


def detect_hardware(device: str = "auto", memory_gb: float | None = None) -> Machine:
    """Return the memory that this machine offers for training.

    Args:
        device: "cuda", "cpu", or "auto" for a GPU if there is one. "cuda" with `memory_gb` may mean a GPU elsewhere.
        memory_gb: memory of the GPU, or RAM, in GiB, instead of what is free now.

    Raises:
        ValueError: there is no such device, or its memory is neither given nor can be read.
    """
    if memory_gb is not None and not 0 < memory_gb < float("inf"):
        message = f"Expected `--memory-gb` to be a positive number, but got {memory_gb}: give GiB, such as 8."
        raise ValueError(message)
    given = None if memory_gb is None else int(memory_gb * GIB)
    ram = free_memory()
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        if given is None and not torch.cuda.is_available():
            message = (
                "Expected a GPU for `--device cuda`, but torch finds none: give `--memory-gb` to plan for another "
                "machine, or use `--device cpu`."
            )
            raise ValueError(message)
        free = torch.cuda.mem_get_info()[0] if given is None else given
        source = f"{free / GIB:.1f} GiB {'free on the GPU' if given is None else 'by --memory-gb'}"
        return Machine("cuda", int(0.9 * free), (ram or free) // 2, source)
    if given is None and ram is None:
        message = "Expected to find how much RAM is free, but this system does not say: give `--memory-gb`."
        raise ValueError(message)
    free = given if given is not None else int(ram or 0)
    source = f"{free / GIB:.1f} GiB {'of RAM free' if given is None else 'by --memory-gb'}"
    return Machine("cpu", free // 2, free // 2, source)


def training_bytes(plan: Plan, patches: int) -> int:
    """Return the memory of a training step of the shipped bundle's network, in bytes.

    The network runs once on torch's `meta` device, which computes shapes only, and the sizes of the tensors kept for
    backward are added up: 3 * patches * (kept + 2 * logits) + 16 * parameters, all float32. Mixed precision takes less.

    Args:
        plan: patch, channels and strides.
        patches: patches per step, `batch_size * num_samples`.

    Example:
        >>> from monai_iou.planning.plan import make_plan
        >>> one, two = (training_bytes(make_plan(None, [], [32, 32, 32]), patches) for patches in (1, 2))
        >>> one < two < 2 * one
        True
    """
    activations, parameters = _cost(
        plan.in_channels, plan.out_channels, plan.channels, plan.strides, plan.patch_size, plan.spatial_dims
    )
    return int(STEP_OVERHEAD * patches * activations + BYTES_PER_PARAMETER * parameters)


@lru_cache(maxsize=256)
def _cost(
    in_channels: int,
    out_channels: int,
    channels: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    patch_size: tuple[int, ...],
    spatial_dims: int,
) -> tuple[int, int]:
    """Return the bytes kept for backward by one patch plus twice its logits, and the number of parameters."""
    modalities, labels = tuple(map(str, range(in_channels))), {value: str(value) for value in range(out_channels)}
    plan = Plan(modalities, labels, (1.0, 1.0, 1.0), patch_size, channels, strides, (), spatial_dims=spatial_dims)
    with torch.device("meta"):
        network = _network(plan)
        image = torch.empty(1, plan.in_channels, *plan.patch_size)
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, tuple[int, Any]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage.nbytes(), storage)  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = network(image)
    logits = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    activations = sum(size for size, _ in kept.values()) + 2 * sum(output.numel() * 4 for output in logits)
    return activations, sum(parameter.numel() for parameter in network.parameters())


def _network(plan: Plan) -> torch.nn.Module:
    """Build `network_def` of the bundle's train.json, so that the network measured is the one that is trained."""
    from monai.bundle.config_parser import ConfigParser

    config = ConfigParser.load_config_file(bundle_path() / "configs" / "train.json")
    # The keys that the network needs: parsing the others takes most of the time.
    parser = ConfigParser({key: value for key, value in config.items() if key not in ("train", "validate")})
    parser["plan"] = plan
    network: torch.nn.Module = parser.get_parsed_content("network_def").train()
    return network
