"""The probabilities of the voxel pass and their logarithms, in plain torch, with the digits of those near 0 and 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from monai_iou.voxels.spec import PassSpec

TINY = 1e-30  # the least number whose logarithm is taken where no activation is applied


def is_binary(spec: PassSpec, classes: int) -> bool:
    """Return whether the cross-entropy counts the voxels of a class and the others: there is nobody else to do so."""
    return spec.activation == "sigmoid" or (spec.activation is None and classes == 1)


def _log_sigmoids(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return ln p and ln(1 - p) of p = sigmoid(x); no digits cancel in either."""
    if logits.requires_grad or _has_tangents():
        return F.logsigmoid(logits), F.logsigmoid(-logits)
    tail = logits.abs().neg_().exp_().log1p_()  # autograd fails at the kink x = 0, but a CPU is four times as fast
    return logits.clamp_max(0).sub_(tail), logits.neg().clamp_max_(0).sub_(tail)


def _has_tangents() -> bool:
    """Return whether derivatives in forward mode may be taken, whose inputs ask for no gradient."""
    return not torch.compiler.is_compiling() and getattr(forward_ad, "_current_level", 0) >= 0


@dataclass(frozen=True)
class Probabilities:
    """p and, where the cross-entropy needs them, ln p and (if it is binary) ln(1 - p); of `classes` classes."""

    value: Tensor
    logarithm: Tensor | None
    complement_logarithm: Tensor | None
    classes: int


def probabilities(logits: Tensor, spec: PassSpec) -> Probabilities:
    """Apply the activation to logits (..., C, N)."""
    classes = logits.shape[-2]
    if spec.activation != "softmax":
        return class_probabilities(logits, spec, classes)
    if not spec.cross_entropy:
        return Probabilities(logits.softmax(-2), None, None, classes)
    log_p = _log_softmax(logits)
    return Probabilities(log_p.exp(), log_p, None, classes)


def _log_softmax(logits: Tensor) -> Tensor:
    """Return ln p. The largest class is ln p = -ln(1 + rest): its digits survive where rest is tiny against 1."""
    shifted = logits - logits.amax(-2, keepdim=True)
    at_peak = shifted >= 0  # not so where a logit is NaN or +inf, which makes all classes NaN, as in torch's softmax
    ties = at_peak.sum(-2, keepdim=True) - 1
    # Subtracted, not left out: the slopes of equal largest logits add up to 0, but their curvatures do not.
    rest = (shifted.exp() - at_peak.to(shifted.dtype)).sum(-2, keepdim=True) + ties
    return shifted - rest.log1p()


def class_probabilities(logits: Tensor, spec: PassSpec, classes: int) -> Probabilities:
    """Apply an activation other than softmax, which looks at one class at a time."""
    if spec.activation == "sigmoid":
        log_p, log_q = _log_sigmoids(logits) if spec.cross_entropy else (None, None)
        return Probabilities(logits.sigmoid(), log_p, log_q, classes)
    if not spec.cross_entropy:
        return Probabilities(logits, None, None, classes)
    log_q = _log_complement(logits) if is_binary(spec, classes) else None
    return Probabilities(logits, logits.clamp_min(TINY).log(), log_q, classes)


def _log_complement(p: Tensor) -> Tensor:
    """Return ln(1 - p) with the digits of a small p, and no less than ln p is; NaN stays."""
    is_zero = 1 - p <= TINY
    return torch.where(is_zero, math.log(TINY), torch.where(is_zero, 0, -p).log1p())
