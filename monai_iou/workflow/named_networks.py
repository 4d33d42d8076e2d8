"""MONAI's networks by the values of the bundle's key `network`, with the size that a plan gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.mednext import MedNeXt
from monai.networks.nets.segresnet_ds import SegResNetDS
from monai.networks.nets.swin_unetr import SwinUNETR
from monai.networks.nets.unet import UNet
from torch import nn

from monai_iou.networks import AttentionMapUnet
from monai_iou.planning.plan import Plan
from monai_iou.workflow.settings import exit_with_message

__all__ = ["named_network", "total_stride"]

SCALES = 3  # outputs with deep supervision: coarser ones hold too few voxels of a small lesion
# Residual blocks of each level of nnU-Net's ResEnc presets (Isensee et al. 2024, https://arxiv.org/abs/2404.09556).
RESENC_BLOCKS = (1, 3, 4, 6, 6, 6)
DYNUNET_LEVELS = 3  # the fewest that MONAI's DynUNet takes
SWIN_HALVINGS = 5  # of SwinUNETR, whatever the plan

Options = dict[str, Any]


def named_network(plan: Plan, options: Mapping[str, Any]) -> nn.Module:
    """Return the network that a plan names, of two dimensions for a plan of slices.

    Args:
        plan: with its `network`.
        options: arguments of MONAI's network, in the place of those that follow from the plan.
    """
    kind, own = NETWORKS[plan.network["network"]]
    shared = {
        "spatial_dims": plan.spatial_dims,
        "in_channels": plan.in_channels,
        "out_channels": plan.out_channels,
    }
    network: nn.Module = kind(**{**shared, **own(plan), **options})
    return network


def total_stride(plan: Plan) -> tuple[int, ...]:
    """Return of what number each side of a volume must be a multiple for the network that a plan names.

    Args:
        plan: with its `network`, which is not overridden by a definition of the user's own.

    Returns:
        A number for each of the three axes, 1 along the axis of the slices.

    Example:
        >>> from monai_iou.planning.plan import make_plan
        >>> from monai_iou.workflow.architecture import with_network
        >>> plan = make_plan(None, [], [64, 64, 16], [1.0, 1.0, 4.0])
        >>> [total_stride(with_network(plan, name)) for name in ("unet", "resenc", "swin_unetr")]
        [(8, 8, 2), (8, 8, 8), (32, 32, 32)]
    """
    name = plan.network["network"]
    if name in ("unet", "dynunet", "attention_unet"):
        sides = tuple(prod(stride[axis] for stride in plan.strides) for axis in range(3))
    else:
        sides = (2 ** (SWIN_HALVINGS if name == "swin_unetr" else _halvings(plan)),) * 3
    return tuple(1 if axis == plan.flat_axis else side for axis, side in enumerate(sides))


def _unet(plan: Plan) -> Options:
    return {"channels": plan.channels, "strides": _strides(plan), "num_res_units": 2}


def _segresnet(plan: Plan) -> Options:
    levels = _halvings(plan)
    return {
        "init_filters": _first_channels(plan),
        "blocks_down": [1] * (1 + levels),
        "norm": "INSTANCE",
        "dsdepth": max(1, min(SCALES, levels)) if plan.network["deep_supervision"] else 1,
    }


def _resenc(plan: Plan) -> Options:
    return {
        **_segresnet(plan),
        "blocks_down": RESENC_BLOCKS[: 1 + _halvings(plan)],
        "act": ("leakyrelu", {"inplace": True}),
        "norm": ("instance", {"affine": True}),
    }


def _dynunet(plan: Plan) -> Options:
    channels, strides, scales = _levels(plan)
    if len(channels) < DYNUNET_LEVELS:
        with exit_with_message():
            message = (
                f"Expected a patch that leaves dynunet at least {DYNUNET_LEVELS} levels, but got "
                f"{list(plan.patch_size)} with {len(channels)}: raise `patch_size`, or choose another `network`."
            )
            raise ValueError(message)
    return {
        "kernel_size": [3] * len(channels),
        "strides": [(1,) * plan.spatial_dims, *strides],
        "upsample_kernel_size": strides,
        "filters": channels,
        "deep_supervision": scales > 0,
        "deep_supr_num": max(scales, 1),
    }


def _attention_unet(plan: Plan) -> Options:
    channels, strides, scales = _levels(plan)
    maps = plan.network["attention"]
    return {"channels": channels, "strides": strides, "coarse_outputs": scales, "returns_maps": maps}


def _mednext(plan: Plan) -> Options:
    """MedNeXt-S of Roy et al. 2023 (https://arxiv.org/abs/2303.09975), which has 32 `init_filters`."""
    blocks = [2] * _halvings(plan)
    return {
        "init_filters": _first_channels(plan),
        "kernel_size": 3,
        "blocks_down": blocks,
        "blocks_up": blocks,
        "use_residual_connection": True,
        "deep_supervision": plan.network["deep_supervision"],
    }


def _swin_unetr(plan: Plan) -> Options:
    return {"feature_size": 12 * max(1, round(_first_channels(plan) / 8))}  # 12 are the least that it takes


NETWORKS: dict[str, tuple[Callable[..., nn.Module], Callable[[Plan], Options]]] = {
    "unet": (UNet, _unet),
    "segresnet": (SegResNetDS, _segresnet),
    "dynunet": (DynUNet, _dynunet),
    "attention_unet": (AttentionMapUnet, _attention_unet),
    "resenc": (SegResNetDS, _resenc),
    "mednext": (MedNeXt, _mednext),
    "swin_unetr": (SwinUNETR, _swin_unetr),
}


def _in_plane(sides: Sequence[int], plan: Plan) -> tuple[int, ...]:
    return tuple(side for axis, side in enumerate(sides) if axis != plan.flat_axis)


def _strides(plan: Plan) -> Any:  # MONAI's annotation knows one number a level
    return [_in_plane(stride, plan) for stride in plan.strides]


def _has_full_resolution(plan: Plan) -> bool:
    return len(plan.strides) > 1 and max(plan.strides[0]) == 1


def _levels(plan: Plan) -> tuple[Sequence[int], Any, int]:
    """Channels, strides and coarser outputs of networks that have a first level at full resolution by themselves."""
    extra = int(_has_full_resolution(plan))
    strides = _strides(plan)[extra:]
    scales = min(SCALES, len(strides)) - 1 if plan.network["deep_supervision"] else 0
    return plan.channels[extra:], strides, scales


def _first_channels(plan: Plan) -> int:
    return plan.channels[0] if max(plan.strides[0]) > 1 else plan.channels[1]


def _halvings(plan: Plan) -> int:
    """How often networks that halve all axes alike can do so."""
    powers = [(side & -side).bit_length() - 1 for side in _in_plane(plan.patch_size, plan)]
    return min(sum(max(stride) > 1 for stride in plan.strides), *powers)
