"""The best training known for a number of minutes: `monai-iou plan --minutes M`.

    60 M (1 - reserve) = start + cases * case + validations * held out * validation + steps * step

The seconds on the right are measured on this machine with the network that is planned (`measure_timing`); the number of
steps follows, and the learning rate falls to 0 at the last one. The first network is the one planned without a limit.
Where it cannot take enough steps for its finer outlines to pay, the network whose first level has half the resolution
takes its place: it costs a third of the time per step, and scores higher in the same time
(docs/results/hippocampus-cpu.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from monai_iou.datasets.folder import SegmentationFolder
from monai_iou.planning.fingerprint import Fingerprint
from monai_iou.planning.hardware import Machine
from monai_iou.planning.plan import Plan, make_plan
from monai_iou.planning.rules import Proposal, propose
from monai_iou.planning.size_rules import STRIDED, Decision, network_decision
from monai_iou.planning.timing import Timing, measure_timing
from monai_iou.tables import counted

__all__ = ["Measure", "propose_within"]


Measure = Callable[[SegmentationFolder, Plan, Mapping[str, Any], Machine], Timing]

RESERVE = 0.1  # for steps that are slower than those timed
# After 1840 steps it scored what the strided network scored after 2944 (docs/results/hippocampus-cpu.md).
FULL_RESOLUTION_STEPS = 1800
MIN_STEPS = 20  # below, the weights are hardly those of a trained network
VALIDATION_SHARE, MAX_VALIDATIONS = 0.05, 10
EPOCHS = 20  # about so many, so that a stop loses little and the last epoch ends near the limit
# Nine to 18 passes over the cases scored higher without random changes than with them (docs/results.md, studies `short`
# and `minutes`); with weak ones, the score fell after 20 to 30 passes (docs/results/hippocampus-cpu.md).
FEW_PASSES, UNCHANGED = 20, {"augmentation": 0.0}
AVERAGED_SHARE = 1 / 30  # of the steps, over which the weights are averaged, as in a plan without a limit


@dataclass(frozen=True)
class _Sides:
    """Numbers of cases: trained on, held out, and both together; of several folds the largest of each.

    With a patient of many cases, one fold trains on most and another holds most out. Both must end in time.
    """

    trained: int
    held_out: int
    both: int

    @staticmethod
    def of(folder: SegmentationFolder, keys: Mapping[str, Any], fold: int | None) -> _Sides:
        folds = keys.get("folds")
        chosen = range(folds) if folds is not None and fold is None else [fold or 0]
        splits = [folder.split(keys.get("val_fraction", 0.0), 0, folds, each) for each in chosen]
        counts = [(len(trained), len(held), len(trained) + len(held)) for trained, held in splits]
        return _Sides(*map(max, zip(*counts, strict=True)))


@dataclass(frozen=True)
class _Budget:
    """What a training has to do within the limit."""

    minutes: float
    sides: _Sides
    batch: int
    timing: Timing

    @property
    def fixed(self) -> float:
        """Seconds that the number of steps does not change, one validation included."""
        return self.timing.start + self.sides.both * self.timing.case + self.validation

    @property
    def validation(self) -> float:
        """Seconds of a validation."""
        return self.sides.held_out * self.timing.validation

    @property
    def validations(self) -> int:
        """Validations beside the steps: as many as take a small share of the time."""
        if not self.sides.held_out:
            return 0
        share = VALIDATION_SHARE * 60 * self.minutes
        fitting = int(share / self.validation) if self.validation else MAX_VALIDATIONS
        return max(1, min(MAX_VALIDATIONS, fitting))

    @property
    def steps(self) -> int:
        """Steps that fit."""
        further = max(0, self.validations - 1) * self.validation
        return int((60 * self.minutes * (1 - RESERVE) - self.fixed - further) / self.timing.step)

    @property
    def epoch_steps(self) -> int:
        """Steps of one pass over the training cases."""
        return max(1, self.sides.trained // self.batch)

    def seconds(self, steps: int, validations: int) -> float:
        """Seconds of a training."""
        further = max(0, validations - 1) * self.validation
        return self.fixed + further + steps * self.timing.step


def propose_within(
    minutes: float,
    folder: SegmentationFolder,
    fingerprint: Fingerprint,
    machine: Machine,
    folds: int | None = None,
    fold: int | None = None,
    *,
    measure: Measure = measure_timing,
) -> Proposal:
    """Decide how to train on a dataset so that the training ends within some minutes on this machine.

    Args:
        minutes: from the start of the training's program to its end.
        folder: the dataset.
        fingerprint: fingerprint of the dataset.
        machine: the machine that trains; it has to be this one.
        folds: number of folds of a cross-validation, None for one split.
        fold: the fold to validate on; None for every fold, each of which then ends within the time.
        measure: times the parts of a training.

    Returns:
        The proposal: that of `propose` where its training ends within the time, else a shorter one.

    Raises:
        ValueError: `minutes` is not a positive number or is too short for a training, the machine is another one, or
            `propose` raises it.
    """
    if not 0 < minutes < math.inf:
        message = f"Expected `--minutes` to be a positive number, but got {minutes:g}: give minutes, such as 30."
        raise ValueError(message)
    proposal = propose(folder, fingerprint, machine, folds, fold or 0)
    planned = proposal.config
    timed, sides = _foreground_first(folder, fingerprint), _Sides.of(folder, planned, fold)
    budget = _budget(minutes, sides, timed, proposal, machine, measure)
    wanted = planned["epochs"] * planned["case_repeats"] * sides.trained // budget.batch
    if budget.steps < min(wanted, FULL_RESOLUTION_STEPS) and planned["full_resolution"]:
        proposal = _strided(proposal, folder, fingerprint, machine)
        budget = _budget(minutes, sides, timed, proposal, machine, measure)
    if budget.steps < max(MIN_STEPS, budget.epoch_steps):
        needed = budget.seconds(max(MIN_STEPS, budget.epoch_steps), 1) / (1 - RESERVE) / 60
        message = (
            f"Expected `--minutes` to be enough for a training on {counted(sides.trained, 'case')}, but got "
            f"{minutes:g}: on this machine it takes {math.ceil(10 * needed) / 10:g} or more."
        )
        raise ValueError(message)
    return _within(proposal, budget, wanted)


def _foreground_first(folder: SegmentationFolder, fingerprint: Fingerprint) -> SegmentationFolder:
    """The folder with its empty cases last: those that are timed are the first ones, and must not all be empty."""
    known = zip(folder.training, fingerprint.measures, strict=True)
    empty = {case for case, measures in known if not measures.facts.foreground.shape[1]}
    return replace(folder, training=tuple(sorted(folder.training, key=lambda case: case in empty)))


def _budget(
    minutes: float,
    sides: _Sides,
    timed: SegmentationFolder,
    proposal: Proposal,
    machine: Machine,
    measure: Measure,
) -> _Budget:
    keys = proposal.config
    timing = measure(timed, proposal.plan, keys, machine)
    return _Budget(minutes, sides, min(keys["batch_size"], sides.trained), timing)


def _strided(proposal: Proposal, folder: SegmentationFolder, fingerprint: Fingerprint, machine: Machine) -> Proposal:
    """Return the proposal with a network whose first level has half the resolution."""
    facts = [case.facts for case in fingerprint.measures]
    keys = proposal.config
    plan = make_plan(folder, facts, keys["patch_size"], keys["pixdim"], STRIDED.base_channels)
    network = network_decision(plan, STRIDED, machine)
    reason = "full resolution would take too few steps within `--minutes`; its step takes about three times as long"
    return _replaced(replace(proposal, plan=plan), replace(network, reason=reason))


def _within(proposal: Proposal, budget: _Budget, wanted: int) -> Proposal:
    """Return the proposal with a length that fits, and weights averaged over the same share of it."""
    if wanted <= budget.steps:
        kept = next(decision for decision in proposal.decisions if decision.name == "length")
        ends = budget.seconds(wanted, kept.keys["epochs"] // kept.keys["val_interval"]) / 60
        note = f"{kept.reason}; ends after about {ends:.1f} of {budget.minutes:g} minutes, and longer ones are unproven"
        if ends <= budget.minutes:
            return _replaced(proposal, replace(kept, reason=note))
    steps = min(budget.steps, wanted)
    repeats = max(1, steps // (EPOCHS * budget.epoch_steps))
    an_epoch = repeats * budget.sides.trained // budget.batch
    epochs = max(1, steps // an_epoch)
    interval = math.ceil(epochs / max(1, budget.validations))
    steps = epochs * an_epoch
    ends = budget.seconds(steps, epochs // interval) / 60
    keys = {"epochs": epochs, "case_repeats": repeats, "val_interval": interval}
    reason = (
        f"{steps} steps of {budget.timing.step:.2f} s as timed here; with {budget.fixed:.0f} s for the start, the "
        f"cases and a validation they end after about {ends:.1f} of {budget.minutes:g} minutes"
    )
    length = Decision("length", f"{counted(epochs, 'epoch')}, validation every {interval}", reason, keys)
    shorter = _replaced(proposal, length, _averaged(proposal, steps))
    passes = epochs * repeats
    return replace(shorter, decisions=(*shorter.decisions, _unchanged(passes))) if passes <= FEW_PASSES else shorter


def _unchanged(passes: int) -> Decision:
    reason = f"each case is seen about {passes} times, too few for the network to learn it by heart"
    return Decision("augmentation", "no random augmentation except patches and flips", reason, UNCHANGED)


def _averaged(proposal: Proposal, steps: int) -> Decision:
    weights = next(decision for decision in proposal.decisions if decision.name == "weights")
    over = max(2.0, AVERAGED_SHARE * steps)
    decay = min(float(weights.keys["ema_decay"]), round(1 - 1 / over, 3))
    reason = f"averaged over about {round(1 / (1 - decay))} of {steps} steps; the learning rate has fallen to 0"
    return replace(
        weights,
        value=f"final weights, averaged with {decay}",
        reason=reason,
        keys={**weights.keys, "ema_decay": decay},
    )


def _replaced(proposal: Proposal, *decisions: Decision) -> Proposal:
    """Return the proposal with these decisions in the places of those of their names."""
    new = {decision.name: decision for decision in decisions}
    return replace(proposal, decisions=tuple(new.get(old.name, old) for old in proposal.decisions))
