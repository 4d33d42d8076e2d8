"""The rule behind each decision of `monai-iou plan`, on measured folders that need no files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser

from monai_iou import InstanceIoULoss
from monai_iou.datasets.cases import Case, CaseFacts
from monai_iou.datasets.folder import SegmentationFolder
from monai_iou.datasets.splits import split_cases
from monai_iou.planning.crop_rules import CROP_RATIOS
from monai_iou.planning.fingerprint import CaseMeasures, Fingerprint, summarise_measures
from monai_iou.planning.hardware import GIB, Machine, training_bytes
from monai_iou.planning.plan import make_plan
from monai_iou.planning.rules import Proposal, propose
from monai_iou.planning.size_rules import cache_decision
from monai_iou.workflow.loading import label_dtype
from monai_iou.workflow.targets import LabelTargetsd

CPU = Machine("cpu", 8 * GIB, 8 * GIB, "16 GiB of RAM free")
GPU = Machine("cuda", 20 * GIB, 8 * GIB, "22 GiB free on the GPU")
Sizes = list[list[int]]  # of the components of a case, a list a foreground class


def dataset(
    cases: list[Sizes],
    shape: tuple[int, int, int] = (60, 60, 60),
    spacing: tuple[float, float, float] = (1, 1, 1),
    modalities: tuple[str, ...] = ("MR",),
    spacings: list[tuple[float, float, float]] | None = None,
) -> tuple[SegmentationFolder, Fingerprint]:
    """A measured folder that needs no files."""
    labels = {0: "background"} | {3 * index + 1: f"label {index}" for index in range(len(cases[0]))}
    named = tuple(Case(f"c{index}", Path(f"c{index}.nii.gz"), Path("l.nii.gz")) for index in range(len(cases)))
    folder = SegmentationFolder(Path(), modalities, labels, named, (), ())
    measures = []
    for index, sizes in enumerate(cases):
        counts = [sum(of_class) for of_class in sizes]
        facts = CaseFacts(shape, spacings[index] if spacings else spacing, np.ones((len(modalities), sum(counts))))
        voxels = (int(np.prod(shape)) - sum(counts), *counts)
        measures.append(CaseMeasures(facts, voxels, tuple(np.array(of_class, dtype=np.int64) for of_class in sizes)))
    return folder, summarise_measures(folder, measures)


def one_lesion(count: int = 6) -> list[Sizes]:
    return [[[100]]] * count


def decide(*args: Any, machine: Machine = CPU, **options: Any) -> Proposal:
    return propose(*dataset(*args, **options), machine)


any_dataset_and_machine = given(
    shape=st.tuples(*[st.integers(4, 400)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 8)] * 3),
    cases=st.integers(1, 40),
    memory=st.floats(0.5, 40),
    device=st.sampled_from(["cpu", "cuda"]),
)


@settings(max_examples=6, deadline=None)
@any_dataset_and_machine
def test_every_plan_fits_and_is_the_plan_that_training_makes(**drawn: Any) -> None:
    check_plan(**drawn)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@any_dataset_and_machine
def test_a_hundred_plans_fit(**drawn: Any) -> None:
    check_plan(**drawn)


def check_plan(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], cases: int, memory: float, device: str
) -> None:
    folder, found = dataset([[[3]]] * cases, shape, spacing)
    machine = Machine(device, int(memory * GIB), int(memory * GIB), "x")
    proposal = propose(folder, found, machine)
    config = proposal.config
    again = make_plan(
        folder,
        [c.facts for c in found.measures],
        config["patch_size"],
        config["pixdim"],
        config["base_channels"],
        full_resolution=config["full_resolution"],
    )
    assert again == proposal.plan
    patches = config["batch_size"] * config["num_samples"]
    assert training_bytes(proposal.plan, max(2, patches)) <= machine.step_bytes
    assert np.prod(proposal.plan.patch_size) <= {"cpu": 64, "cuda": 128}[device] ** 3
    assert 1 <= config["batch_size"] <= cases
    assert 0 <= config["cache_rate"] <= 1
    assert 1 <= config["val_interval"] <= config["epochs"] <= 1000
    # As near a cube in mm as possible: only an axis that ends at the volume is much shorter than the others.
    edges = np.array(proposal.plan.patch_size) * config["pixdim"]
    unit = np.prod(proposal.plan.strides, axis=0) * config["pixdim"]
    for axis in range(3):
        ends = proposal.plan.patch_size[axis] >= shape[axis]
        assert ends or edges[axis] + 2 * unit.max() >= edges.max() or edges[axis] >= edges.max() / 2


def test_the_median_volume_is_taken_whole_where_it_fits() -> None:
    config = decide(one_lesion(30), (35, 50, 35)).config
    assert config["patch_size"] == [40, 56, 40]
    assert config["num_samples"] == 1
    assert (config["positive_crops"], config["negative_crops"]) == (1, 1)


def test_small_patches_and_gpus_get_a_network_at_full_resolution() -> None:
    small = decide(one_lesion(30), (35, 50, 35))
    assert (small.config["base_channels"], small.config["full_resolution"]) == (8, True)
    assert small.plan.strides[0] == (1, 1, 1)
    large = decide(one_lesion(30), (150, 150, 150))
    assert (large.config["base_channels"], large.config["full_resolution"]) == (16, False)
    assert large.plan.strides[0] == (2, 2, 2)
    assert small.plan.channels[1:] == large.plan.channels[:4]
    on_gpu = decide(one_lesion(30), (150, 150, 150), machine=GPU).plan
    assert on_gpu.channels[0] == 32
    assert on_gpu.strides[0] == (1, 1, 1)


def test_thick_slices_take_the_tenth_percentile() -> None:
    spacings = [(1.0, 1.0, 5.0)] * 7 + [(1.0, 1.0, 2.0)] * 3
    assert decide(one_lesion(10), spacings=spacings).config["pixdim"] == [1, 1, 2]
    spacings = [(1.0, 1.0, 2.5)] * 7 + [(1.0, 1.0, 2.0)] * 3
    assert decide(one_lesion(10), spacings=spacings).config["pixdim"] == [1, 1, 2.5]


def test_less_memory_never_gives_more() -> None:
    folder, found = dataset(one_lesion(20), (200, 200, 200))
    sizes = []
    for memory in (0.1, 0.4, 1.6, 8):
        config = propose(folder, found, Machine("cuda", int(memory * GIB), GIB, "x")).config
        sizes.append(np.prod(config["patch_size"]) * config["batch_size"] * config["num_samples"])
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    message = "Expected memory for a training step of two patches of .* voxels, .*free memory or plan for a larger"
    with pytest.raises(ValueError, match=message):
        propose(folder, found, Machine("cuda", GIB // 2000, GIB, "0.0 GiB"))


@pytest.mark.parametrize("patches", [2, 4])
def test_the_counted_memory_is_what_backward_keeps(patches: int) -> None:
    from monai.networks.nets import UNet

    plan = make_plan(None, [], [24, 24, 16], base_channels=4)
    network = UNet(3, 1, 2, plan.channels, plan.strides, num_res_units=2)
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = network(torch.zeros(patches, 1, *plan.patch_size))
    weights = {parameter.data_ptr(): parameter.untyped_storage().nbytes() for parameter in network.parameters()}
    activations = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in weights)
    expected = 3 * (activations + 8 * logits.numel()) + 4 * sum(weights.values())
    assert training_bytes(plan, patches) == pytest.approx(expected, rel=0.02)


@settings(max_examples=30, deadline=None)
@given(empty=st.integers(0, 9), components=st.integers(1, 6), side=st.integers(40, 300))
def test_emptier_and_larger_sets_get_more_patches_on_foreground(empty: int, components: int, side: int) -> None:
    cases: list[Sizes] = [[[20] * components]] * (10 - empty) + [[[]]] * empty
    config = decide(cases, (side,) * 3).config
    ratio = config["positive_crops"], config["negative_crops"]
    assert ratio in CROP_RATIOS
    if side**3 <= 64**3:
        assert ratio == (1, 1)  # the patch holds the volume
        return
    reached = ratio[0] / sum(ratio) * (10 - empty) / 10
    assert reached >= 0.5 - 1e-9 or ratio == CROP_RATIOS[-1]
    if not empty and components == 1 and side > 100:
        assert ratio == (2, 1)


def test_a_class_that_never_occurs_is_named() -> None:
    proposal = decide([[[50], []]] * 4)
    assert proposal.config["class_weights"][2] == 0
    reason = next(decision.reason for decision in proposal.decisions if decision.name == "class weights")
    assert reason.endswith("; no voxel of label 1, which cannot be learned")
    assert proposal.config["loss"]["_target_"] == "monai_iou.IoUCELoss"


def test_one_lesion_a_case_takes_the_compound() -> None:
    assert decide(one_lesion()).config["loss"] == {
        "_target_": "monai_iou.IoUCELoss",
        "include_background": False,
        "softmax": True,
        "batch": True,
        "sync_batch": True,
        "lambda_ce": 1 / 3,
    }


@given(
    sizes=st.lists(st.lists(st.integers(1, 2000), min_size=0, max_size=9), min_size=1, max_size=6),
)
@settings(max_examples=30, deadline=None)
def test_many_unequal_lesions_take_the_loss_that_counts_lesions(sizes: list[list[int]]) -> None:
    found = [of_case for of_case in sizes if of_case]
    if not found:
        return
    loss = decide([[of_case] for of_case in sizes]).config["loss"]
    assert loss.get("spacing") == ("$@plan.pixdim" if loss["_target_"] == "monai_iou.InstanceIoULoss" else None)
    ratios = [max(of_case) / np.median(of_case) for of_case in found if len(of_case) > 1]
    unequal = bool(ratios) and float(f"{np.median(ratios):.6g}") >= 4
    many = np.median([len(of_case) for of_case in found]) >= 3
    assert loss["_target_"] == ("monai_iou.InstanceIoULoss" if many and unequal else "monai_iou.IoUCELoss")


@given(small=st.integers(1, 50), factor=st.floats(1, 30))
@settings(max_examples=20, deadline=None)
def test_classes_of_unequal_size_take_a_weighted_loss(small: int, factor: float) -> None:
    large = int(small * factor)
    config = decide([[[small], [large]]] * 4).config
    unequal = float(f"{large / 60**3:.6g}") >= 10 * float(f"{small / 60**3:.6g}")
    assert config["loss"]["_target_"] == ("monai_iou.CompoundLoss" if unequal else "monai_iou.IoUCELoss")
    if unequal:
        assert config["loss"]["losses"][1]["weight"] == config["class_weights"]
        assert config["class_weights"][1] > config["class_weights"][2] > config["class_weights"][0]


@pytest.mark.parametrize("cases", [one_lesion(), [[[1, 1, 2, 500]]] * 4, [[[4], [400]]] * 4])
@pytest.mark.parametrize("shape", [(1, 1, 8, 8, 8), (4, 1, 8, 8, 8)])
def test_every_loss_can_be_built_and_has_a_gradient(cases: list[Sizes], shape: tuple[int, ...]) -> None:
    proposal = decide(cases)
    parser = ConfigParser({"plan": proposal.plan, "loss": proposal.config["loss"]})
    loss = parser.get_parsed_content("loss")
    cells = [part for part in loss.modules() if isinstance(part, InstanceIoULoss)]
    assert [part.spacing for part in cells] == [proposal.plan.pixdim] * len(cells)
    classes = len(cases[0]) + 1
    logits = torch.randn(shape[0], classes, *shape[2:], requires_grad=True)
    for highest in (0, classes - 1):
        label = torch.zeros(shape)
        label[..., 2:4, 2:4, 2:4] = highest
        value = loss(logits, label)
        value.backward()
        assert torch.isfinite(value)
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()


@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=40), side=st.floats(0.5, 3))
@settings(max_examples=30, deadline=None)
def test_nothing_below_the_lesion_threshold_could_match_an_annotated_lesion(sizes: list[int], side: float) -> None:
    config = decide([[sizes]], spacing=(side,) * 3).config
    threshold = config["lesion_threshold_mm3"]
    assert threshold >= side**3 * (1 - 1e-3)
    volumes = np.array(sizes) * side**3
    # The best IoU of a component of the threshold's volume is the ratio of the volumes.
    matched = threshold * (1 - 1e-3) / np.maximum(volumes, threshold) > 0.5
    assert threshold <= side**3 * (1 + 1e-3) or np.mean(matched) <= 0.01 + 1 / len(sizes)


@pytest.mark.parametrize("patients", [1, 2, 3])
def test_the_plan_says_of_one_patient_that_nothing_is_held_out(patients: int) -> None:
    """Three scans of so many patients."""
    folder, found = dataset(one_lesion(3))
    folder = replace(
        folder, patient_groups={f"P{i}": [f"c{j}" for j in range(i, 3, patients)] for i in range(patients)}
    )
    found = summarise_measures(folder, found.measures)
    assert found.patients == patients
    proposal = propose(folder, found, CPU)
    (split,) = [decision for decision in proposal.decisions if decision.name == "split"]
    training, validation = folder.split(proposal.config["val_fraction"], 0, None, 0)
    is_on_both_sides = bool({*training} & {*validation})
    assert is_on_both_sides == (patients == 1)
    assert ("all cases for training and for validation" in split.value) == is_on_both_sides
    assert ("each on one side of the split" in split.reason) == (not is_on_both_sides)


@given(st.integers(1, 60), st.sampled_from([CPU, GPU]))
@settings(max_examples=20, deadline=None)
def test_length_and_split_follow_the_number_of_cases(cases: int, machine: Machine) -> None:
    config = decide(one_lesion(cases), machine=machine).config
    fraction = config["val_fraction"]
    assert 0.1 <= fraction <= 0.25
    assert cases < 12 or fraction * cases >= 3 - 0.005 * cases
    assert config["epochs"] // config["val_interval"] >= 20
    folder, _ = dataset(one_lesion(cases))
    trained = len(split_cases(folder.training, fraction, 0, folder.patient_groups)[0])
    assert trained * config["case_repeats"] <= {"cpu": 50, "cuda": 250}[machine.device] * config["batch_size"] + trained
    steps = config["epochs"] * (trained * config["case_repeats"] // config["batch_size"])
    assert {"cpu": 3000, "cuda": 25_000}[machine.device] <= steps


@pytest.mark.parametrize(
    ("changes", "bytes_a_voxel"),
    [
        ({}, 1),
        ({"ignore": 9}, 1),
        ({"regions": {"a": (1,), "b": (1,)}}, 3),
        ({"mean_of_raters": True}, 8),
        ({"soft_labels": True}, 8),
        ({"soft_labels": True, "regions": {"a": (1,), "b": (1,)}}, 12),
        ({"labels": {value: str(value) for value in range(300)}}, 2),
        ({"labels": {value: str(value) for value in range(256)}, "ignore": 999}, 2),
    ],
)
def test_prepared_volumes_are_counted_as_their_targets_are_kept(changes: dict[str, Any], bytes_a_voxel: int) -> None:
    _, found = dataset(one_lesion(), (64, 64, 64))
    plan = replace(make_plan(None, [], [16, 16, 16]), **changes)
    label = torch.zeros((len(plan.class_names) if plan.soft_labels else 2, 5, 6, 7), dtype=label_dtype(plan))
    label = label if plan.soft_labels or plan.mean_of_raters else label[:1]
    target = LabelTargetsd("label", plan).target(label)
    assert target.element_size() * len(target) == bytes_a_voxel == plan.label_bytes
    needed = 6 * 64**3 * (4 + bytes_a_voxel)
    decided = cache_decision(plan, found, replace(CPU, cache_bytes=needed // 2))
    assert decided.keys["cache_rate"] == pytest.approx(0.5, abs=0.011)
    assert "divide `cache_rate` by their number" in decided.reason
