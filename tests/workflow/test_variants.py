"""The keys instance, deep_supervision, attention and network: every combination makes a step, or says why not."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from torch import Tensor

from monai_iou import (
    AttentionSupervisionLoss,
    ComponentRegionsd,
    CompoundLoss,
    ContextAttentionLoss,
    InstanceIoULoss,
    IoUCELoss,
    LovaszSoftmaxLoss,
    MultiScaleLoss,
)
from monai_iou.bundle_files import bundle_path
from monai_iou.datasets.cases import CaseFacts
from monai_iou.planning.plan import Plan, make_plan
from monai_iou.workflow import named_networks, settings
from monai_iou.workflow.architecture import HALVING, ONE_OUTPUT, with_network
from monai_iou.workflow.variants import NETWORKS, build_loss, build_network, without_cells

SWITCHES = list(itertools.product((False, True), repeat=3))


def tiny_plan(*, full_resolution: bool = False) -> Plan:
    return make_plan(None, [], [24, 24, 16], base_channels=4, full_resolution=full_resolution)


def tiny_batch(plan: Plan, *, carried: bool) -> tuple[Tensor, Tensor]:
    labels = torch.zeros(2, 1, *plan.patch_size)
    labels[:, :, 3:6, 3:6, 3:6] = labels[:, :, 12:20, 12:20, 4:10] = 1
    images = labels + torch.rand(labels.shape, generator=torch.Generator().manual_seed(0))
    transform = ComponentRegionsd("label", 2)
    return images, torch.stack([transform({"label": label})["label"] for label in labels]) if carried else labels


def refusal(network: str | None, deep: bool, attention: bool) -> str | None:
    if attention and network not in (None, "attention_unet"):
        return f"Expected `network` to be attention_unet with --attention true, but got '{network}', which has no"
    if deep and network in ONE_OUTPUT:
        known = "segresnet, dynunet, attention_unet, resenc or mednext"
        return f"Expected `network` to be {known} with --deep_supervision true, but got '{network}'"
    return None


# SwinUNETR's smallest patch is 7 times as large as that of the others.
COMBINED = [None, *NETWORKS[:-1], pytest.param(NETWORKS[-1], marks=pytest.mark.slow)]


@pytest.mark.parametrize("network", COMBINED)
def test_every_combination_makes_a_step_or_is_refused_in_one_sentence(network: str | None) -> None:
    slow = network in ("resenc", "mednext", "swin_unetr")  # and their losses are those of segresnet
    for instance, deep, attention in SWITCHES[: 4 if slow else None]:
        message = refusal(network, deep, attention)
        if message is not None:
            with pytest.raises(ValueError, match=r"^Expected") as caught:
                build_network(tiny_plan(), network, deep, attention)
            assert str(caught.value).startswith(message)
            continue
        plan = with_network(tiny_plan(), network, deep, attention)
        images, labels = tiny_batch(plan, carried=instance)
        made = build_network(plan)
        base = IoUCELoss(softmax=True, include_background=False, batch=True, sync_batch=True)
        loss = build_loss(base, plan, instance, deep, attention)
        value = loss(made(images), labels)
        value.backward()
        assert value.isfinite()
        assert all(weights.grad is not None for weights in made.parameters()), "DDP waits for every gradient"
        assert made.eval()(images).shape == (2, 2, *plan.patch_size)
        parts = {type(part) for part in loss.modules()}
        chosen = {InstanceIoULoss: instance, MultiScaleLoss: deep, AttentionSupervisionLoss: attention}
        assert all((kind in parts) == on for kind, on in chosen.items())


@pytest.mark.parametrize("name", HALVING)
@pytest.mark.parametrize("flat", [False, True], ids=["volumes", "slices"])
@pytest.mark.parametrize("full_resolution", [False, True])
def test_networks_that_halve_all_axes_keep_the_plans_levels_on_few_thick_slices(
    name: str, flat: bool, full_resolution: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    size, spacing = ([32, 7, 32], [1.0, 8.0, 1.0])
    options: dict[str, Any] = {"full_resolution": full_resolution}
    if flat:  # slices of long pixels
        size, spacing, options = [32, 7, 1], [1.0, 8.0, 8.0], {**options, "spatial_dims": 2}
    before = make_plan(None, [], size, spacing, base_channels=2, **options)
    assert before.patch_size == tuple(size)
    plan = with_network(before, name, deep_supervision=True)
    assert plan.patch_size == tuple(8 if side == 7 else side for side in size)
    assert (
        f"{plan.patch_size}: {name} takes multiples of 4, as it halves all axes alike. unet, dynunet and" in caplog.text
    )
    images = torch.rand(1, 1, *plan.patch_size)
    outputs = build_network(plan)(images)
    sides = [tuple(side for side in output.shape[2:] if side > 1) for output in outputs]
    whole = tuple(side for side in plan.patch_size if side > 1)
    assert sides[:2] == [whole, tuple(side // 2 for side in whole)]
    levels = 1 + len(plan.strides) - full_resolution
    assert levels == 3
    kinds = {"segresnet": [1] * levels, "resenc": [1, 3, 4], "mednext": [2] * (levels - 1)}
    found = named_networks.NETWORKS[name][1](plan)["blocks_down"]
    assert list(found) == kinds[name]
    # What a trained model has stored is followed as it is, also a patch from before the sides were rounded up.
    assert with_network(plan) is plan


@pytest.mark.parametrize("name", HALVING)
def test_a_thick_slab_that_is_halved_four_times_takes_16_slices(name: str) -> None:
    plan = make_plan(None, [], [256, 256, 7], [1.0, 1.0, 8.0])
    assert plan.patch_size == (256, 256, 7)
    assert with_network(plan, name).patch_size == (256, 256, 16)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in (*HALVING, "swin_unetr")])
def test_networks_that_follow_the_plans_strides_keep_its_patch(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert with_network(make_plan(None, [], [32, 32, 7], [1.0, 1.0, 8.0]), name).patch_size == (32, 32, 7)
    for equal in ([64, 64, 64], [40, 56, 40], [24, 24, 16]):
        plan = make_plan(None, [], equal)
        assert {with_network(plan, each).patch_size for each in (name, *HALVING)} == {plan.patch_size}
    assert not caplog.text


def test_switches_arrive_as_text_and_arguments_pass_through() -> None:
    plan = tiny_plan(full_resolution=True)
    outputs = build_network(plan, "null", "true", "false", norm="BATCH")(tiny_batch(plan, carried=False)[0])
    assert [output.shape[2:] for output in outputs] == [(24, 24, 16), (12, 12, 8)]
    deep = build_loss(IoUCELoss(softmax=True), plan, "false", "true", "false", "null")
    assert isinstance(deep, MultiScaleLoss)
    assert deep.downsample == "area"
    lovasz = CompoundLoss([LovaszSoftmaxLoss(softmax=True)])
    hard = build_loss(lovasz, plan, deep_supervision=True)
    assert isinstance(hard, MultiScaleLoss)
    assert hard.downsample == "max"
    with pytest.raises(ValueError, match="with LovaszSoftmaxLoss, which needs hard labels, but got 'area'"):
        build_loss(lovasz, plan, deep_supervision=True, downsample="area")
    own = InstanceIoULoss(softmax=True, cells="both")
    assert build_loss(own, plan, instance=True) is own
    with pytest.raises(ValueError, match=r"^Expected `network` to be one of unet, segresnet, dynunet, attention_unet"):
        build_network(plan, "vnet")
    small = make_plan(None, [], [8, 8, 8], base_channels=4)
    with pytest.raises(
        ValueError, match=r"leaves dynunet at least 3 levels, but got \[8, 8, 8\] with 2: raise `patch_"
    ):
        build_network(small, "dynunet")


def test_carried_regions_are_those_found_on_the_fly_at_the_finest_scale() -> None:
    plan = tiny_plan()
    images, carried = tiny_batch(plan, carried=True)
    outputs = build_network(plan, deep_supervision=True, attention=True)(images)
    options: dict[str, Any] = {"instance": True, "deep_supervision": True, "attention": True}
    values = [
        build_loss(IoUCELoss(softmax=True), plan, **options)(outputs, label) for label in (carried, carried[:, :1])
    ]
    torch.testing.assert_close(*values)


def test_a_loss_that_measures_distances_has_the_voxel_size_of_the_plan() -> None:
    """Labels in training are plain tensors: without it, distances would be those of voxels of 1 mm."""
    plan = replace(tiny_plan(), pixdim=(1.0, 1.0, 5.0))
    own, given = InstanceIoULoss(softmax=True), InstanceIoULoss(softmax=True, spacing=2.0)
    nested = MultiScaleLoss(CompoundLoss([IoUCELoss(softmax=True)]))
    attentive = AttentionSupervisionLoss(nested, ContextAttentionLoss())
    for loss in (own, MultiScaleLoss(own), given, attentive):
        build_loss(loss, plan)
    assert (own.spacing, given.spacing) == ((1.0, 1.0, 5.0), 2.0)
    assert [part.spacing for part in attentive.modules() if isinstance(part, ContextAttentionLoss)] == [(1.0, 1.0, 5.0)]
    label = torch.zeros(1, 1, 24, 24, 12)
    label[..., 8:11, 12, 2] = label[..., 14:17, 12, 9] = 1
    images = torch.randn(1, 2, *label.shape[2:], generator=torch.Generator().manual_seed(0))
    in_mm = ComponentRegionsd("label", 2, spacing=plan.pixdim)({"label": label[0]})["label"][None]
    in_voxels = ComponentRegionsd("label", 2)({"label": label[0]})["label"][None]
    found = build_loss(InstanceIoULoss(softmax=True), plan)(images, label)
    torch.testing.assert_close(found, InstanceIoULoss(softmax=True)(images, in_mm))
    assert found != InstanceIoULoss(softmax=True)(images, in_voxels)


def test_a_list_of_outputs_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"^Expected `input` to be a tensor, but got a list of 2: wrap the loss in a "):
        InstanceIoULoss(softmax=True)([torch.zeros(1, 2, 8, 8)] * 2, torch.zeros(1, 1, 8, 8))  # type: ignore[arg-type]


def test_a_loss_with_cells_of_its_own_keeps_them_and_other_regions_are_refused() -> None:
    plan = tiny_plan()
    voronoi, blob = (InstanceIoULoss(regions, softmax=True) for regions in ("voronoi", "blob"))
    nested = CompoundLoss([IoUCELoss(softmax=True)])
    for own in (voronoi, blob):
        assert build_loss(own, plan) is own
        assert build_loss(own, plan, instance=False) is own
        assert build_loss(own, plan, instance="null") is own
        assert build_loss(own, plan, instance=True, regions=own.regions) is own
    assert build_loss(blob, plan, instance=True) is blob, "the default asks for nothing"
    assert isinstance(build_loss(nested, plan, instance=True, regions="blob"), InstanceIoULoss)
    for instance, regions, loss in itertools.product(
        (None, False, True), ("blob", "foo"), (voronoi, MultiScaleLoss(voronoi))
    ):
        with pytest.raises(ValueError, match=r"^Expected") as caught:
            build_loss(loss, plan, instance=instance, regions=regions)
        assert str(caught.value) == (
            "Expected `regions` to be 'voronoi', as the InstanceIoULoss in `loss` has its own `regions`, but got "
            f"{regions!r}: leave --regions out, and change `regions` in a config's `loss`."
        )


@pytest.mark.parametrize("instance", [False, "false"])
def test_without_instance_the_loss_of_a_plan_is_its_global_term(
    instance: bool | str, caplog: pytest.LogCaptureFixture
) -> None:
    plan, inner = tiny_plan(), IoUCELoss(softmax=True)
    planned = InstanceIoULoss(softmax=True, global_loss=inner)
    assert without_cells(planned, instance) is inner
    assert caplog.messages == [
        "`instance` is false, so that the loss is IoUCELoss, the global term of the InstanceIoULoss in `loss`."
    ]
    own = InstanceIoULoss(softmax=True, batch=True)
    images, labels = tiny_batch(plan, carried=False)
    logits = torch.cat([images, -images], 1)
    own(logits, labels)
    torch.testing.assert_close(without_cells(own, instance)(logits, labels), own.last_terms["global"])
    for loss, kept in ((inner, instance), (planned, None), (planned, "null"), (planned, True), (planned, "true")):
        assert without_cells(loss, kept) is loss


@pytest.mark.parametrize(
    "loss",
    [
        InstanceIoULoss(softmax=True, lambda_global=0),
        CompoundLoss([InstanceIoULoss(softmax=True), IoUCELoss(softmax=True)]),
        MultiScaleLoss(InstanceIoULoss(softmax=True)),
        InstanceIoULoss(softmax=True, global_loss=CompoundLoss([InstanceIoULoss(softmax=True)])),
    ],
)
def test_without_instance_a_loss_whose_cells_cannot_be_left_out_is_refused(loss: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match=r"^Expected `instance` to be null or true .* but got false with \w+: leave "):
        without_cells(loss, instance=False)


@pytest.mark.parametrize(("expression", "has_cells"), [("@loss", True), (None, False)], ids=["older", "shipped"])
def test_instance_false_means_in_an_older_copy_of_the_bundle_what_it_meant_there(
    expression: str | None, has_cells: bool
) -> None:
    """There, false was the default: a planned loss kept its cells."""
    config = ConfigParser.load_config_file(str(bundle_path() / "configs" / "train.json"))
    config["loss"] = {
        "_target_": "monai_iou.InstanceIoULoss",
        "softmax": True,
        "global_loss": {"_target_": "monai_iou.IoUCELoss", "softmax": True},
    }
    if expression is not None:
        config["training_loss"]["loss"] = expression
    for instance, expected in ((False, has_cells), (None, True)):
        parser = ConfigParser({**config, "instance": instance, "plan": tiny_plan()})
        loss = parser.get_parsed_content("training_loss")
        assert any(isinstance(part, InstanceIoULoss) for part in loss.modules()) is expected


@pytest.mark.parametrize(
    ("key", "value", "needs"),
    [
        ("regions", "blob", "instance"),
        ("downsample", "max", "deep_supervision"),
        ("context_mm", 3.0, "attention"),
    ],
)
def test_a_key_that_nothing_reads_is_refused(key: str, value: object, needs: str) -> None:
    plan, loss = tiny_plan(), IoUCELoss(softmax=True)
    for off in ({}, {needs: False}, {needs: "null"}):
        given: dict[str, Any] = {**off, key: value}
        with pytest.raises(ValueError, match=r"^Expected") as caught:
            build_loss(loss, plan, **given)
        assert str(caught.value) == (
            f"Expected `{key}` to be left out without --{needs} true, but got {value!r}: add --{needs} true, or leave "
            f"--{key} out."
        )
    used: dict[str, Any] = {needs: True, key: value}
    assert build_loss(loss, plan, **used) is not loss


def test_keys_of_a_loss_that_does_it_in_its_own_way_are_refused() -> None:
    plan, loss = tiny_plan(), IoUCELoss(softmax=True)
    scales, maps = MultiScaleLoss(loss), AttentionSupervisionLoss(loss, ContextAttentionLoss())
    given: dict[str, Any] = {"deep_supervision": True, "attention": True}
    with pytest.raises(ValueError, match="Expected `downsample` to be left out, because `loss` is already a Multi"):
        build_loss(scales, plan, downsample="max", **given)
    with pytest.raises(ValueError, match="`context_mm` to be left out, because `loss` is already an AttentionSup"):
        build_loss(maps, plan, context_mm=3.0, **given)
    assert build_loss(maps, plan, attention=True) is maps


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"instance": True, "regions": "foo"},
            "Expected `regions` to be voronoi or blob, the cells of lesions, but got 'foo': choose one; unions of ",
        ),
        ({"attention": True, "context_mm": -1}, "Expected `context_mm` to be a finite number at least 0, but got -1: "),
        ({"instance": "maybe"}, "Expected `instance` to be true, false or null, but got 'maybe': "),
    ],
)
def test_under_the_bundles_command_one_sentence_ends_the_program(
    keys: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "is_bundle_command", lambda: True)
    with pytest.raises(SystemExit) as caught:
        build_loss(IoUCELoss(softmax=True), tiny_plan(), **keys)
    assert str(caught.value.code).startswith(f"monai_iou: {expected}")


NO_SCRIPT = [("dynunet", True), ("mednext", False), ("mednext", True)]  # as docs/networks.md says; and swin_unetr


@pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support:UserWarning")
@pytest.mark.parametrize("flat_axis", [None, 0, 2])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("network", COMBINED)
def test_networks_are_exported_to_torchscript_as_the_page_says(
    network: str | None, deep: bool, flat_axis: int | None
) -> None:
    name = network or "unet"
    if deep and name in ONE_OUTPUT:
        return
    shape: Any = tuple(1 if axis == flat_axis else 32 for axis in range(3))
    slices = make_plan(None, [CaseFacts(shape, (1.0, 1.0, 1.0), np.zeros((1, 0)))], [24, 24, 24], base_channels=4)
    plan = with_network(tiny_plan() if flat_axis is None else slices, name, deep)
    built = build_network(plan).eval()
    if (name, deep) in NO_SCRIPT or name == "swin_unetr":
        with pytest.raises((RuntimeError, torch.jit.frontend.NotSupportedError)):
            torch.jit.script(built)
        return
    image = torch.rand(1, 1, *plan.patch_size)
    with torch.inference_mode():
        torch.testing.assert_close(torch.jit.script(built)(image), built(image))


def test_attention_is_refused_at_once_where_a_class_was_not_annotated_in_some_case() -> None:
    plan = replace(make_plan(None, [], [32, 32, 32], base_channels=4), partly_labelled=True)
    message = (
        "Expected every class to be annotated in every case to supervise attention maps, but got cases without "
        "some (`labelled` in dataset.json): leave --attention out, or these cases."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build_loss(IoUCELoss(softmax=True), plan, attention=True)
