"""A network output that is not finite: no mask, no score, one sentence, and the other cases go on."""

from __future__ import annotations

import csv
import inspect
import math
from pathlib import Path
from typing import Any

import monai.inferers.inferer
import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_runs import causes, overrides
from ignite.engine import Events
from monai.handlers import from_engine

from monai_iou.bundle_files import copy_bundle
from monai_iou.datasets.cases import DatasetError
from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.demo import run_workflow
from monai_iou.handlers import DiceHandler, IoUHandler
from monai_iou.workflow.checkpoint_files import write_atomically
from monai_iou.workflow.engines import CaseEvaluator
from monai_iou.workflow.failures import TrainingError, run


class Loader(list[dict[str, Any]]):
    """Batches of one volume each; the marked ones give NaN."""

    def __init__(self, *marked: bool) -> None:
        super().__init__(
            {"image": torch.full((1, 1, 2, 2, 2), math.nan if bad else 1.0), "label": torch.ones(1, 1, 2, 2, 2),
             "case": [f"case{index}"]}
            for index, bad in enumerate(marked)
        )  # fmt: skip


class Count:
    """A metric that notes which cases it sees."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.completed = 0

    def attach(self, engine: Any) -> None:
        from ignite.engine import Events

        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: self.seen.append(e.state.batch[0]["case"]))
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda _: setattr(self, "completed", self.completed + 1))


@pytest.mark.parametrize("marked", [(False, True, False), (True, True), (False,)])
@pytest.mark.parametrize("network", [torch.nn.Identity(), torch.nn.LayerNorm(2)])
def test_other_cases_go_on(marked: tuple[bool, ...], network: torch.nn.Module) -> None:
    count = Count()
    engine = CaseEvaluator(
        device=torch.device("cpu"), val_data_loader=Loader(*marked), network=network, val_handlers=[count],
        epoch_length=len(marked),
    )  # fmt: skip
    failed = [f"case{index}" for index, bad in enumerate(marked) if bad]
    for _ in range(2):  # a second run forgets the first
        count.seen = []
        if failed:
            with pytest.raises(TrainingError) as caught:
                run(engine)
            lines = str(caught.value).splitlines()
            assert [line.split(",")[0] for line in lines] == [
                f"Expected a finite network output for {case}" for case in failed
            ]
            assert all(line.endswith("no mask is written and no score is given.") for line in lines)
        else:
            run(engine)
        assert count.seen == [f"case{index}" for index, bad in enumerate(marked) if not bad]
    assert count.completed == (0 if all(marked) else 2), "means over nothing"


@pytest.mark.parametrize(("error", "lines"), [(SystemExit, 0), (KeyboardInterrupt, 0), (RuntimeError, 1)])
def test_a_signal_that_ends_an_evaluation_is_no_error_of_the_engine(
    error: type[BaseException], lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    engine = CaseEvaluator(
        device=torch.device("cpu"), val_data_loader=Loader(False), network=torch.nn.Identity(), epoch_length=1
    )

    @engine.on(Events.ITERATION_STARTED)
    def receive() -> None:
        raise error

    with pytest.raises(error):
        engine.run()
    assert caplog.text.count("Engine run is terminating due to exception") == lines


def test_an_evaluation_without_a_score_does_not_keep_an_earlier_one() -> None:
    """MONAI's federated client reads the scores itself, and sees no error."""
    options: Any = {"include_background": False, "num_classes": 2, "output_transform": from_engine(["pred", "label"])}
    engine = CaseEvaluator(
        device=torch.device("cpu"), val_data_loader=Loader(False), network=torch.nn.Identity(), epoch_length=1,
        key_val_metric={"iou": IoUHandler(**options)}, additional_metrics={"dice": DiceHandler(**options)},
    )  # fmt: skip
    engine.run()
    assert (engine.state.metrics, sorted(engine.state.metric_details)) == ({"iou": 1.0, "dice": 1.0}, ["dice", "iou"])
    engine.data_loader = Loader(True)
    engine.run()
    assert [*engine.state.metrics] == ["iou", "dice"]
    assert all(math.isnan(value) for value in engine.state.metrics.values())
    assert engine.state.metric_details == {}
    engine.data_loader = Loader(False)
    engine.run()
    assert engine.state.metrics == {"iou": 1.0, "dice": 1.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom_dataset(tmp_path_factory.mktemp("data"), training=3, evaluation=2, shape=(32, 32, 24))


class Overflow(torch.nn.Module):
    """A network that overflows on bright volumes, as one in float16 does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv3d(1, 2, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layer(image) * (math.inf if image.min() > 0 else 1.0)


def test_no_mask_and_no_score_of_a_case_that_overflows(data: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(tmp_path / "bundle")
    bright = sorted((data / "imagesTs").iterdir())[0]
    image = nib.load(bright)
    voxels = np.full(image.shape, 3000, np.int16)
    nib.save(nib.Nifti1Image(voxels, image.affine, image.header), bright)
    network = {"network_def": {"_target_": "test_engines.Overflow"}, "load_pretrain": False}
    given = {**overrides(bundle, data, output_dir=str(tmp_path / "scores")), **network}
    masks = {
        "bundle_root": str(bundle), "dataset_dir": str(data), "output_dir": str(tmp_path / "masks"),
        "patch_size": [24, 24, 16], **network,
    }  # fmt: skip
    for configs, settings in ((["inference"], masks), (["train", "evaluate"], given)):
        with pytest.raises(RuntimeError) as caught:
            run_workflow(bundle, configs, settings)
        (found,) = {str(cause) for cause in causes(caught.value) if isinstance(cause, TrainingError)}
        assert found.startswith(f"Expected a finite network output for {bright}, but it has NaN or infinity: look at")
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["phantom_04.nii.gz"]
    with (tmp_path / "scores" / "test_mean_iou_raw.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [Path(row["filename"]).name for row in rows] == ["phantom_04.nii.gz"]


class Sure(torch.nn.Module):
    """A network whose classes are hundreds of logits apart, as after a long training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv3d(1, 2, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layer(image) * 0 + torch.cat([-image, image], 1) * 1000


def test_a_network_that_is_sure_in_every_view_writes_masks_and_scores(data: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(tmp_path / "bundle")
    network = {"network_def": {"_target_": "test_engines.Sure"}, "load_pretrain": False, "tta_flips": True}
    given = {**overrides(bundle, data, output_dir=str(tmp_path / "scores")), **network}
    run_workflow(bundle, ["train", "evaluate"], given)
    for name in ("overwrite", "epochs", "val_interval", "val_fraction", "batch_size", "num_samples", "pictures"):
        del given[name]
    run_workflow(bundle, ["inference"], {**given, "output_dir": str(tmp_path / "masks")})
    assert len(list((tmp_path / "masks").iterdir())) == 2
    with (tmp_path / "scores" / "test_mean_iou_raw.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 2


@pytest.mark.parametrize(
    ("configs", "inferer"),
    [(["inference"], "inferer"), (["train", "evaluate"], "validate#inferer"), (["train"], "validate#inferer")],
    ids=["inference", "evaluation", "training"],
)
def test_the_output_of_a_volume_that_does_not_fit_onto_the_gpu(
    configs: list[str], inferer: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = monai.inferers.inferer.sliding_window_inference

    def too_small(*args: Any, **kwargs: Any) -> Any:
        if inspect.signature(joined).bind(*args, **kwargs).arguments["device"] is None:  # that of the image
            message = "CUDA out of memory. Tried to allocate 2.00 GiB"
            raise torch.OutOfMemoryError(message)
        return joined(*args, **kwargs)

    monkeypatch.setattr(monai.inferers.inferer, "sliding_window_inference", too_small)
    bundle = copy_bundle(tmp_path / "bundle")
    own = {"network_def": {"_target_": "test_engines.Sure"}}
    places = {"bundle_root": str(bundle), "dataset_dir": str(data), "output_dir": str(tmp_path / "out")}
    given = {**overrides(bundle, data, epochs=1), **places, **own}
    given = given if configs == ["train"] else {**given, "load_pretrain": False}
    given = {**places, **own, "load_pretrain": False, "patch_size": [24, 24, 16]} if inferer == "inferer" else given
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, configs, given)
    (sentence,) = {str(cause) for cause in causes(caught.value) if isinstance(cause, TrainingError)}
    outside = (
        f"set `sw_batch_size` to 1 and `{inferer}#device` to cpu, which moves the output to the machine's own memory, "
        "or set `device` to cpu; if that memory itself is full, set `num_workers` to 0."
    )
    training = (
        "lower `patch_size`, `batch_size`, `num_samples` or, if the machine's own memory is full, `cache_rate`; in a "
        f"validation, set `sw_batch_size` to 1 and `{inferer}#device` to cpu."
    )
    remedy = training if configs == ["train"] else outside
    assert sentence == f"Expected the run to fit into memory, but it ran out of it: {remedy}"
    run_workflow(bundle, configs, {**given, f"{inferer}#device": "cpu"})
    written = {"inference": "out/*.nii.gz", "evaluate": "out/test_mean_iou_raw.csv", "train": "bundle/models/model.pt"}
    assert list(tmp_path.glob(written[configs[-1]]))


def test_weights_that_are_not_finite_end_inference_and_evaluation(data: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(tmp_path / "bundle")
    run_workflow(bundle, ["train"], overrides(bundle, data, epochs=1))
    path = bundle / "models" / "model.pt"
    weights = torch.load(path, weights_only=True)
    next(iter(weights.values())).view(-1)[0] = math.nan
    write_atomically(weights, path)
    for configs in (["inference"], ["train", "evaluate"]):
        with pytest.raises(RuntimeError) as caught:
            run_workflow(bundle, configs, overrides(bundle, data, output_dir=str(tmp_path / "out")))
        assert any(
            isinstance(cause, DatasetError) and f"Expected {path} to hold finite weights, but" in str(cause)
            for cause in causes(caught.value)
        )
    assert not (tmp_path / "out").exists()
