"""From probabilities to labels: thresholds and the smallest components, tuned on the validation cases alone.

They are tuned with the weights that these cases chose (:mod:`monai_iou.workflow.tuning`), and kept beside the model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.data.meta_tensor import MetaTensor
from monai.transforms.transform import MapTransform
from numpy.typing import NDArray

from monai_iou.components import label_components
from monai_iou.datasets.cases import DatasetError
from monai_iou.planning.plan import Plan
from monai_iou.tables import text_remedy
from monai_iou.workflow.checkpoint_files import write_atomically
from monai_iou.workflow.failures import explain_out_of_memory
from monai_iou.workflow.finite_outputs import is_finite, not_finite
from monai_iou.workflow.labelled import LABELLED
from monai_iou.workflow.models import load_weights, sibling_path
from monai_iou.workflow.optimization import inner_module
from monai_iou.workflow.run_lock import alone_in
from monai_iou.workflow.settings import exit_with_message, optional
from monai_iou.workflow.targets import ScoredLabelsd
from monai_iou.workflow.tuning import (
    CONNECTIVITY,
    Postprocessing,
    compact_prediction,
    labels_of,
    tune,
    tune_classes,
)

__all__ = [
    "LabelsFromProbabilitiesd",
    "Postprocessing",
    "compact_prediction",
    "load_postprocessing",
    "tune",
    "tune_postprocessing",
]

logger = logging.getLogger(__name__)


def load_postprocessing(path: str | None, classes: int, models: Sequence[str] | None = None) -> Postprocessing:
    """Read what was tuned; without the file, the most probable class is taken and nothing is removed.

    Args:
        path: of `postprocessing.json`; None for none.
        classes: of the network, background included.
        models: paths of the models. Then only the file beside the first of them may be missing: any other one is named
            by the user. None lets every file be missing, as copies of the bundle's earlier configs do.

    Raises:
        DatasetError: the file is damaged, of another network, or missing.
    """
    if optional(path) is None:
        return Postprocessing()
    if not Path(str(path)).is_file():
        _check_may_be_missing(str(path), models)
        return Postprocessing()
    remedy = "tune again or delete it"
    try:
        content = json.loads(Path(str(path)).read_text(encoding="utf-8"))
        threshold, sizes = content["threshold"], tuple(float(size) for size in content["min_size_mm3"])
        usable = len(sizes) == classes - 1 and (threshold is None or _is_usable(threshold, classes))
        problem = "" if usable else f"it does not fit {classes} classes"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem, remedy = f"it cannot be read ({error})", text_remedy(error, remedy)
    if problem:
        with exit_with_message():
            message = f"Expected {path} to be what training tuned, but {problem}: {remedy}."
            raise DatasetError(message)
    return Postprocessing(tuple(threshold) if isinstance(threshold, list) else threshold, sizes)


def _is_usable(threshold: Any, classes: int) -> bool:
    """Whether it is a number for one foreground class, or a list of numbers for several."""
    numbers = threshold if isinstance(threshold, list) else [threshold]
    fits = isinstance(threshold, list) == (classes > 2) and len(numbers) == classes - 1
    return fits and all(0 < number < 1 for number in numbers)


def _check_may_be_missing(path: str, models: Sequence[str] | None) -> None:
    if models is None or Path(path) == Path(sibling_path(models, "postprocessing.json")):
        return
    message = (
        f"Expected `postprocessing_file` to be a file that training tuned, but there is no file {path}: correct the "
        "path, or write --postprocessing_file null for no post-processing."
    )
    with exit_with_message():
        raise DatasetError(message)


class LabelsFromProbabilitiesd(MapTransform):
    """Turn probabilities into a label map: by the most probable class or thresholds, without the smallest components.

    Components have 26 neighbours; what is removed becomes background. The voxel's volume is that of the MetaTensor's
    affine, 1 mm^3 for a plain tensor. Regions that overlap become maps of 0 and 1, each without its own small
    components. What thresholds mean is said at :func:`monai_iou.workflow.tuning.labels_of`.

    Args:
        keys: probabilities of shape (C, *S).
        settings: thresholds and smallest sizes.
        exclusive: whether a voxel belongs to one class.
        allow_missing_keys: do not fail where a key is absent.

    Example:
        >>> foreground = torch.tensor([0.9, 0.1, 0.9, 0.9, 0.4]).reshape(1, 1, 1, 5)
        >>> item = {"pred": torch.cat([1 - foreground, foreground])}
        >>> LabelsFromProbabilitiesd("pred", Postprocessing(0.3, (2.0,)))(item)["pred"].flatten()
        tensor([0., 0., 1., 1., 1.])
    """

    def __init__(
        self,
        keys: KeysCollection,
        settings: Postprocessing | None = None,
        exclusive: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.settings = settings if settings is not None else Postprocessing()
        self.exclusive = exclusive

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with label maps of shape (1, *S), or maps (C, *S) of regions."""
        items = dict(data)
        for key in self.key_iterator(items):
            items[key] = self._labels(torch.as_tensor(items[key]))  # a MetaTensor stays one
        return items

    def _labels(self, probabilities: torch.Tensor) -> torch.Tensor:
        found = labels_of(probabilities.as_subclass(torch.Tensor), self.settings.threshold, self.exclusive)
        labels = found.to(torch.float32)  # the type that MONAI's AsDiscrete gives
        sizes, volume = self.settings.min_size_mm3, 1.0
        if isinstance(probabilities, MetaTensor):
            volume = abs(float(torch.det(probabilities.affine[:3, :3])))
        limits_of: dict[int, Sequence[float]] = {0: sizes}
        if not self.exclusive:
            limits_of = {region: (size,) for region, size in enumerate(sizes, start=1)}
        for channel, limits in limits_of.items():
            if any(limit > 0 for limit in limits):
                kept = without_small(labels[channel].cpu().numpy(), limits, volume)
                labels[channel] = torch.from_numpy(kept).to(labels)
        if isinstance(probabilities, MetaTensor):
            done = probabilities.applied_operations
            return MetaTensor(labels, meta=probabilities.meta, applied_operations=done)
        return labels


def without_small(labels: NDArray[Any], min_size_mm3: Sequence[float], voxel_mm3: float) -> NDArray[Any]:
    """Return a label map in which components below their class's smallest volume are background."""
    result: NDArray[Any] = labels.copy()
    for value, smallest in enumerate(min_size_mm3, start=1):
        if smallest > 0:
            components, _ = label_components(labels == value, CONNECTIVITY)
            # A voxel volume of an oblique affine is off by some digits.
            small = np.bincount(components.ravel()) * voxel_mm3 < smallest * (1 - 1e-4)
            small[0] = False
            result[small[components]] = 0
    return result


def tune_postprocessing(
    evaluator: Any, dataset: Any, pixdim: Sequence[float], classes: int, ckpt_dir: str, plan: Plan | None = None
) -> Postprocessing | None:
    """Tune on the validation cases with the stored weights and write `postprocessing.json` beside them.

    Only rank 0 works; nothing is written where nothing raises the validation IoU, or an output is NaN or infinite.

    Args:
        evaluator: of the validation; its network gets the weights of `model.pt`.
        dataset: the validation cases, on the grid of training.
        pixdim: voxel size of that grid in mm.
        classes: of the network, background included.
        ckpt_dir: folder of `model.pt`.
        plan: what the labels are; None for label maps of which every voxel counts.

    Raises:
        TrainingError: the machine or the GPU ran out of memory.
        OutputError: another run holds `ckpt_dir`.
    """
    if evaluator.state.rank != 0 or len(dataset) == 0:
        return None
    path = Path(ckpt_dir) / "postprocessing.json"
    with alone_in(path.parent, "tuning"):
        network = inner_module(evaluator.network)  # DistributedDataParallel would wait for the other ranks
        with exit_with_message():
            network.load_state_dict(load_weights(str(path.with_name("model.pt"))))
        cases = _Predictions(evaluator, network, dataset, plan)
        try:
            with explain_out_of_memory():
                if classes == 2:
                    settings, before, after = tune(list(map(_compact_case, cases)), float(np.prod(pixdim)), classes)
                else:
                    settings, before, after = tune_classes(cases, float(np.prod(pixdim)), cases.exclusive)
        except _NotFiniteError:
            return None
        if after <= before:
            path.unlink(missing_ok=True)
            of_what = "" if np.isinf(before) else f" of {before:.4f}"  # no case may have a score
            logger.info("No threshold or smallest component raises the validation IoU%s.", of_what)
            return None
        write_atomically(settings.to_json(), path)
    logger.info("Validation IoU %.4f -> %.4f with %s: %s", before, after, settings, path)
    return settings


def _compact_case(case: tuple[torch.Tensor, torch.Tensor]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the probability and the map (*S) of the only foreground class, whatever form the label has."""
    probabilities, label = case
    foreground = label[1].clone() if len(label) > 1 else label[0]
    return compact_prediction(probabilities), np.asarray(foreground.cpu())


class _NotFiniteError(Exception):
    """The network's output of a validation case holds NaN or infinity."""


class _Predictions:
    """The probabilities and the label of each validation case as they are scored, predicted anew each time.

    Every case whose output is not finite is logged, and left out; behind the last case they raise `_NotFiniteError`.
    """

    def __init__(self, evaluator: Any, network: torch.nn.Module, dataset: Any, plan: Plan | None) -> None:
        self.evaluator, self.network, self.dataset, self.plan = evaluator, network, dataset, plan
        self.exclusive = plan is None or plan.exclusive

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield probabilities (C, *S), and a label map (1, *S) or maps (C, *S)."""
        is_complete = True
        for item in self.dataset:
            found = [case for case in (self._case(item),) if case is not None]
            is_complete = is_complete and bool(found)
            if found:
                yield found.pop()  # nothing here keeps a whole volume while the next one is predicted
        if not is_complete:
            raise _NotFiniteError

    def _case(self, item: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
        logits = self._logits(item)
        if is_finite(logits):
            return self._scored(logits[0].float(), item)
        logger.error(not_finite(item, "or set `amp` to false; no post-processing is tuned"))
        return None

    def _logits(self, item: Mapping[str, Any]) -> torch.Tensor:
        evaluator = self.evaluator
        image = torch.as_tensor(item["image"])[None].to(evaluator.state.device)
        with (
            torch.no_grad(),
            evaluator.mode(self.network),
            torch.autocast("cuda", enabled=evaluator.amp and image.device.type == "cuda", **evaluator.amp_kwargs),
        ):
            logits: torch.Tensor = evaluator.inferer(image, self.network)
        return logits

    def _scored(self, logits: torch.Tensor, item: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits.as_subclass(torch.Tensor)
        probabilities, label = logits.softmax(0) if self.exclusive else logits.sigmoid(), item["label"]
        if self.plan is not None:
            given: dict[Hashable, Any] = {"pred": probabilities, "label": label, LABELLED: item.get(LABELLED)}
            scored = ScoredLabelsd(["pred", "label"], self.plan)(given)
            probabilities, label = scored["pred"], scored["label"]
        return probabilities, torch.as_tensor(label).as_subclass(torch.Tensor)
