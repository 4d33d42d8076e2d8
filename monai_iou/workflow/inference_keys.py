"""What a training's keys and configs mean for inference: the masks of held-out cases are made by inference.json."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_iou.bundle_files import bundle_path
from monai_iou.files import OutputError
from monai_iou.tables import counted
from monai_iou.workflow.config_errors import ConfigError
from monai_iou.workflow.config_files import read_config

__all__ = [
    "AS_SHIPPED",
    "check_preprocessing",
    "check_written",
    "inference_identity",
    "keys_for_inference",
    "keys_for_masks",
    "keys_over",
    "not_written",
    "of_training",
]

# How the network is run; what else inference needs is stored with the model.
SHARED = ("amp", "amp_dtype", "device", "num_workers", "sw_batch_size", "sw_overlap")
# Where a validation keeps and computes the network's output, which inference has under another name.
INFERER, OF_VALIDATION, DEVICES = "inferer#", "validate#inferer#", ("device", "sw_device")
# What the shipped inference.json has where a command decides; a run's own copy may have something else.
AS_SHIPPED = {"models": None, "mask_format": ".nii.gz", "mask_suffix": "", "save_probabilities": False}
# What commands give inference.json, whether it has these keys or not.
OF_COMMANDS = (*SHARED, *AS_SHIPPED, "images", "ckpt_dir", "output_dir")
TRANSFORMS = "train#deterministic_transforms"
TRAINED, VALIDATED = "train#preprocessing", "validate#preprocessing"
# What earlier versions resampled by: the same but for voxels of micrometres.
RESAMPLED_BEFORE, RESAMPLED = "Spacingd", "monai_iou.transforms.ResampleSpacingd"
AS_TRAINED = ("$@train#deterministic_transforms", "$@train#deterministic_transforms[:-1]")  # of earlier versions
TRAIN, INFERENCE = "train.json", "inference.json"
# Of keys without a place; the training itself says so.
NO_CONFIG = (AttributeError, KeyError, IndexError, TypeError, ValueError)


def keys_for_inference(configs: Sequence[Path], keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a training that hold for inference too, as far as they were given.

    Args:
        configs: of the training: the bundle's train.json, whose own values are not taken because inference.json has
            others, and those that change it.
        keys: over them.

    Returns:
        Key -> plain value.

    Example:
        >>> keys_for_inference([Path("train.json")], {"sw_batch_size": 1, "epochs": 3})
        {'sw_batch_size': 1}
    """
    given = {name.lstrip("+") for path in configs[1:] if path.is_file() for name in read_config(path)} | set(keys)
    parser = _parser(configs, keys)
    values = {name: parser.get_parsed_content(name) for name in SHARED if name in given}
    for name in DEVICES:
        if parser.get(OF_VALIDATION + name) is not None:
            values[INFERER + name] = parser.get_parsed_content(OF_VALIDATION + name)
    return {name: _plain(value) for name, value in values.items()}


def of_training(sentence: str) -> str:
    """Return what inference says of its keys as `monai-iou train` takes them.

    Example:
        >>> of_training("Expected room, but there is none: set `inferer#device` to cpu.")
        'Expected room, but there is none: set `validate#inferer#device` to cpu.'
    """
    return sentence.replace(f"`{INFERER}", f"`{OF_VALIDATION}")


def keys_over(config: Path, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the keys whose value the config has already, so that the others replace what was written into it.

    Args:
        config: an inference.json; one that lacks a key has its value as shipped.
        keys: all that a command decides, also where it decides for the value as shipped.

    Raises:
        ConfigError: the config cannot be read.

    Example:
        >>> keys_over(Path("inference.json"), {"mask_format": ".nii.gz", "mask_suffix": "_mask"})
        {'mask_suffix': '_mask'}
    """
    has = {**AS_SHIPPED, **(read_config(config) if config.is_file() else {})}
    return {name: value for name, value in keys.items() if name not in AS_SHIPPED or has[name] != value}


def keys_for_masks(
    config: Path,
    cases: Sequence[Mapping[str, Any]],
    masks: Path,
    models: Mapping[str, Any],
    configs: Sequence[Path],
    keys: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the keys by which a training's inference.json makes the masks of cases that were held out.

    Args:
        config: the inference.json.
        cases: with the keys `case` and `image`, among others.
        masks: folder of the masks.
        models: the keys that name the model.
        configs: of the training.
        keys: over them.
    """
    images = [{name: item[name] for name in ("case", "image")} for item in cases]
    given = {**AS_SHIPPED, **models, **keys_for_inference(configs, keys)}
    return {"images": images, **keys_over(config, given), "output_dir": str(masks)}


def check_written(config: Path, files: Sequence[Path]) -> None:
    """Check that an inference.json has written its results, which a user may have sent to other places.

    Args:
        config: it.
        files: that the command takes for written.

    Raises:
        ConfigError: one of them is not there.
    """
    if missing := [path for path in files if not path.is_file()]:
        raise not_written(config, missing)


def not_written(config: Path, files: Sequence[Path]) -> ConfigError:
    """Return the error for results that an inference.json, whose run ended well, did not write.

    >>> print(not_written(Path("run/configs/inference.json"), [Path("masks/a.nii.gz"), Path("masks/b.nii.gz")]))
    Expected run/configs/inference.json to write masks/a.nii.gz (and 1 more file), but its run ended without doing so:
    write what `output_dir`, `mask_suffix`, `mask_format` and `save_probabilities` ask for, as the inference.json that
    `monai-iou init` copies does.
    """
    more = len(files) - 1
    others = f" (and {counted(more, 'more file')})" if more else ""
    message = (
        f"Expected {config} to write {files[0]}{others}, but its run ended without doing so: write what `output_dir`, "
        "`mask_suffix`, `mask_format` and `save_probabilities` ask for, as the inference.json that `monai-iou init` "
        "copies does."
    )
    return ConfigError(message)


def check_preprocessing(configs: Sequence[Path], keys: Mapping[str, Any]) -> None:
    """Check that a training whose images are prepared in another way has an inference that does likewise.

    Transforms of the label alone may differ: inference has no label. So may what `train#preprocessing` does after the
    deterministic transforms.

    Args:
        configs: of the training, the run's own train.json first; inference.json lies beside it.
        keys: over them.

    Raises:
        OutputError: the configs or keys prepare images in another way than the shipped train.json, and inference does
            as the shipped inference.json.
    """
    if not configs or not configs[0].with_name(INFERENCE).is_file():
        return
    inference, shipped = configs[0].with_name(INFERENCE), bundle_path() / "configs"
    try:
        changed = _changed(_parser(configs, keys), _parser([shipped / TRAIN], {}))
        own, theirs = (read_config(path).get("preprocessing") for path in (inference, shipped / INFERENCE))
    except NO_CONFIG:
        return
    if changed is not None and own == theirs:
        message = (
            f"Expected `preprocessing` in {inference} to be changed as well, because `{changed}` of the training was "
            "changed, but it is as it was shipped, so that masks would be made of images that are prepared in another "
            'way: change it there likewise, or give it a "_desc_" if it is to stay, and start the command again.'
        )
        raise OutputError(message)


def inference_identity(configs: Sequence[Path]) -> str | None:
    """Return a hash of the inference.json by which the masks of held-out cases are made, None if there is none.

    Args:
        configs: of the training, the run's own train.json first; inference.json lies beside it.

    Example:
        >>> inference_identity([]) is None
        True
    """
    path = configs[0].with_name(INFERENCE) if configs else None
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path is not None and path.is_file() else None


def _plain(value: Any) -> Any:
    """A value as a command line may hold it: lists and plain values as they are, others, such as a dtype, as text."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _parser(configs: Sequence[Path], keys: Mapping[str, Any]) -> Any:
    """MONAI's parser of those configs that are there, merged as for a run, with keys over them."""
    from monai.bundle.config_parser import ConfigParser

    files = [path for path in configs if path.is_file()]
    for path in files:
        read_config(path)  # names a damaged one
    parser = ConfigParser(ConfigParser.load_config_files([str(path) for path in files]))
    for name, value in keys.items():
        with contextlib.suppress(*NO_CONFIG):
            parser[name] = value
    return parser


def _changed(given: Any, shipped: Any) -> str | None:
    """The first key by which a training prepares images in another way than as shipped, None if there is none."""
    expected = _of_images(shipped.get(TRANSFORMS))
    if _of_images(given.get(TRANSFORMS)) != expected:
        return TRANSFORMS
    trained, validated = (_transforms(given, place) for place in (TRAINED, VALIDATED))
    if isinstance(trained, list):  # what is drawn at random follows
        trained = _of_images(trained)[: len(expected)]
    elif f"@{TRANSFORMS}" in str(trained):
        trained = expected
    if validated in (*AS_TRAINED, _transforms(shipped, VALIDATED)):
        validated = expected
    found = {TRAINED: trained, VALIDATED: _of_images(validated)}
    return next((place for place, transforms in found.items() if transforms not in (None, expected)), None)


def _transforms(parser: Any, place: str) -> Any:
    """The transforms of a `Compose`, as the config has them; None if there is none."""
    found = parser.get(place)
    found = found.get("transforms") if isinstance(found, Mapping) else found
    return found.replace("::", "#") if isinstance(found, str) else found


def _of_images(transforms: Any) -> Any:
    """Transforms without those of the label alone; an expression as it is."""
    if not isinstance(transforms, list):
        return transforms
    kept = [each for each in transforms if not (isinstance(each, Mapping) and each.get("keys") in ("label", ["label"]))]
    return [_as_now(each) for each in kept]


def _as_now(transform: Any) -> Any:
    is_former = isinstance(transform, Mapping) and transform.get("_target_") == RESAMPLED_BEFORE
    return {**transform, "_target_": RESAMPLED} if is_former else transform
