"""What a training's keys and configs mean for inference: the masks of held-out cases are made by inference.json."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_iou.bundle_files import bundle_path
from monai_iou.files import OutputError

__all__ = ["check_preprocessing", "keys_for_inference"]

# How the network is run; what else inference needs is stored with the model.
SHARED = ("amp", "amp_dtype", "device", "num_workers", "sw_batch_size", "sw_overlap")
TRANSFORMS = "train#deterministic_transforms"
INFERENCE = "inference.json"
NO_CONFIG = (KeyError, IndexError, TypeError, ValueError)  # of keys without a place; the training itself says so


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
    given = {name.lstrip("+") for path in configs[1:] if path.is_file() for name in _content(path)} | set(keys)
    parser = _parser(configs, keys)
    values = {name: parser.get_parsed_content(name) for name in SHARED if name in given}
    return {name: _plain(value) for name, value in values.items()}


def check_preprocessing(configs: Sequence[Path], keys: Mapping[str, Any]) -> None:
    """Check that a training whose images are prepared in another way has an inference that does likewise.

    Transforms of the label alone may differ: inference has no label.

    Args:
        configs: of the training, the run's own train.json first; inference.json lies beside it.
        keys: over them.

    Raises:
        OutputError: the configs or keys change the training's transforms, and inference has those that are shipped.
    """
    if not configs or not configs[0].with_name(INFERENCE).is_file():
        return
    inference, shipped = configs[0].with_name(INFERENCE), bundle_path() / "configs" / INFERENCE
    try:
        before, after = (_image_transforms(*given) for given in ((configs[:1], {}), (configs, keys)))
        own, theirs = (_content(path).get("preprocessing") for path in (inference, shipped))
    except NO_CONFIG:
        return
    if before != after and own == theirs:
        message = (
            f"Expected `preprocessing` in {inference} to be changed as well, because `{TRANSFORMS}` of the training "
            "are, but it is as it was shipped, so that masks would be made of images that are prepared in another way: "
            'change it there likewise, or give it a "_desc_" if it is to stay, and start the command again.'
        )
        raise OutputError(message)


def _plain(value: Any) -> Any:
    """A value as a command line may hold it: lists and plain values as they are, others, such as a dtype, as text."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _content(path: Path) -> dict[str, Any]:
    from monai.bundle.config_parser import ConfigParser

    return dict(ConfigParser.load_config_file(str(path)))


def _parser(configs: Sequence[Path], keys: Mapping[str, Any]) -> Any:
    """MONAI's parser of those configs that are there, merged as for a run, with keys over them."""
    from monai.bundle.config_parser import ConfigParser

    parser = ConfigParser(ConfigParser.load_config_files([str(path) for path in configs if path.is_file()]))
    for name, value in keys.items():
        with contextlib.suppress(*NO_CONFIG):
            parser[name] = value
    return parser


def _image_transforms(configs: Sequence[Path], keys: Mapping[str, Any]) -> Any:
    transforms = _parser(configs, keys).get(TRANSFORMS)
    if not isinstance(transforms, list):  # an expression
        return transforms
    return [each for each in transforms if not (isinstance(each, Mapping) and each.get("keys") in ("label", ["label"]))]
