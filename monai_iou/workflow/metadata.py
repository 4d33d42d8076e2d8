"""What a trained bundle's metadata says of its own network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from monai_iou.datasets.cases import DatasetError
from monai_iou.files import write_text
from monai_iou.planning.plan import Plan
from monai_iou.planning.rules import without_signs
from monai_iou.planning.stored import load_plan
from monai_iou.workflow.architecture import with_network
from monai_iou.workflow.config_files import read_config
from monai_iou.workflow.named_networks import total_stride
from monai_iou.workflow.run_state import FOLD
from monai_iou.workflow.trained_models import find_models, why_none


def with_plan(metadata: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Return `metadata` with the channels, classes and sides of patches of a plan; everything else is as it was.

    Names have no characters that MONAI, which reads the metadata with the config, takes for references.

    Example:
        >>> from monai_iou.planning.plan import Plan
        >>> plan = Plan(("CT",), {0: "background", 2: "tumour"}, (1.0,) * 3, (16,) * 3, (8, 16), ((2, 2, 2),), ())
        >>> metadata = {"network_data_format": {"inputs": {"image": {}}, "outputs": {"pred": {}}}}
        >>> with_plan(metadata, plan)["network_data_format"]["outputs"]["pred"]["channel_def"]
        {'0': 'background', '1': 'tumour'}
        >>> with_plan(metadata, plan)["network_data_format"]["inputs"]["image"]["spatial_shape"]
        ['2*(n+1)', '2*n', '2*n']
    """
    formats = metadata["network_data_format"]
    channels = without_signs({str(index): name for index, name in enumerate(plan.modalities)})
    classes = without_signs({str(index): name for index, name in enumerate([plan.labels[0], *plan.class_names])})
    shape = {"spatial_shape": _spatial_shape(plan)}
    image = {**formats["inputs"]["image"], "num_channels": plan.in_channels, **shape, "channel_def": channels}
    prediction = {**formats["outputs"]["pred"], "num_channels": plan.out_channels, **shape, "channel_def": classes}
    own = {"inputs": {**formats["inputs"], "image": image}, "outputs": {**formats["outputs"], "pred": prediction}}
    values = ", ".join(f"{value} {without_signs(name)}" for value, name in plan.labels.items())
    return {
        **metadata,
        "label_classes": f"one channel: {values}",
        "pred_classes": f"one channel per class: {', '.join(classes.values())}",
        "network_data_format": {**formats, **own},
    }


def _spatial_shape(plan: Plan) -> list[int | str]:
    """Return the sides that the network takes, as MONAI's `verify_net_in_out` reads them; `n` is 1 there.

    One side has two voxels at the coarsest level, because no mean can be taken of a single one. Of the user's own
    network it is known only that it takes the patch.
    """
    stored = with_network(plan)
    if "definition" in stored.network:
        return list(plan.patch_size)
    strides = total_stride(stored)
    longest = max(range(3), key=lambda axis: plan.patch_size[axis] // strides[axis] - (axis == plan.flat_axis))
    sides: list[int | str] = [f"{stride}*{'(n+1)' if axis == longest else 'n'}" for axis, stride in enumerate(strides)]
    return [1 if axis == plan.flat_axis else side for axis, side in enumerate(sides)]


def describe_model(bundle_root: str | os.PathLike[str]) -> Path:
    """Rewrite a trained bundle's `configs/metadata.json` so that it names its network's channels, classes and sides.

    The shipped metadata is that of one channel, one foreground class and sides that are multiples of 16. What reads a
    bundle's metadata (the model zoo's checks, MONAI Label, MONAI Deploy) then sees those of `models/model.json`, or of
    the first fold's, as all folds of a run have one plan.

    Args:
        bundle_root: a copy of the bundle (`monai-iou init`) that has been trained, or a fold in it, whose metadata are
            those of the copy.

    Returns:
        The path of the metadata.

    Raises:
        ValueError: the bundle has no `models/model.json`, or no metadata.
        ConfigError: the metadata cannot be read.
        OutputError: they cannot be written; the earlier ones remain.
    """
    root = Path(bundle_root)
    path, model = _metadata_file(root), _model_file(root)
    bundle = "it is not", "name the folder of a bundle"
    for file, (why, remedy) in ((path, bundle), (model, why_none(root, "it is not", "train the bundle first"))):
        if not file.is_file():
            message = f"Expected `{file}` to be there, but {why}: {remedy}."
            raise ValueError(message)
    try:
        metadata = with_plan(read_config(path), load_plan(model))
    except (KeyError, TypeError) as error:
        message = (
            f"Expected `{path}` to be a bundle's metadata, but it is not ({error}): copy it from `monai-iou init`."
        )
        raise ValueError(message) from error
    write_text(path, json.dumps(metadata, indent=4) + "\n")
    return path


def _metadata_file(root: Path) -> Path:
    """Return the metadata of a bundle or, for a fold that has none of its own, of the bundle around it."""
    own, around = (folder / "configs" / "metadata.json" for folder in (root, root.absolute().parent))
    is_fold = FOLD.fullmatch(root.absolute().name) is not None
    return around if is_fold and around.is_file() and not own.is_file() else own


def _model_file(root: Path) -> Path:
    """Return the plan of a bundle's model or, where it has none, of its first fold's."""
    own = root / "models" / "model.json"
    try:
        return own if own.is_file() else find_models(root).files[0].with_suffix(".json")
    except DatasetError:  # there is no model at all
        return own
