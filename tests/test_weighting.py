"""Class weights: formulas, counting in datasets and files, the command and the config that reads its JSON."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.bundle import ConfigParser
from monai.data.dataloader import DataLoader as MonaiLoader
from monai.data.dataset import Dataset
from monai.data.utils import pad_list_data_collate
from monai.transforms.croppad.batch import PadListDataCollate
from places import DATA, DOCS
from torch.utils.data import DataLoader

from monai_iou import ComponentRegionsd, WeightedCrossEntropyLoss, class_weights, count_voxels
from monai_iou.cli import main
from monai_iou.components import whole_numbers
from monai_iou.datasets.label_counts import count_label_files


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=8), st.sampled_from(["inverse", "median", "effective"]))
def test_rarer_weighs_more_and_the_mean_is_one(counts: list[int], method: str) -> None:
    weights = class_weights(counts, method).double()
    assert weights.mean().item() == pytest.approx(1, abs=1e-5)
    order = np.argsort(counts)
    assert (np.diff(weights.numpy()[order]) <= 1e-5).all()
    torch.testing.assert_close(class_weights(torch.tensor(counts), method).double(), weights)


def test_inverse_is_in_proportion_to_one_over_the_count() -> None:
    weights = class_weights([1000, 100, 10])
    assert weights[2] / weights[0] == pytest.approx(100)
    assert weights[1] / weights[0] == pytest.approx(10)


def test_median_frequency_counts_only_the_cases_with_the_class() -> None:
    # Class 2 lives in the second case only: its frequency is 10 / 100, not 10 / 300.
    counts = [[180, 20, 0], [60, 30, 10]]
    frequency = np.array([240 / 300, 50 / 300, 10 / 100])
    expected = np.median(frequency) / frequency
    np.testing.assert_allclose(class_weights(counts, "median"), expected / expected.mean(), rtol=1e-6)
    together = np.median(f := np.array([240, 50, 10]) / 300) / f
    np.testing.assert_allclose(class_weights([240, 50, 10], "median"), together / together.mean(), rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 1 - 1e-9])
def test_effective_number(beta: float) -> None:
    counts = [5, 70, 100_000]
    # Cui et al.: 1 + beta + ... + beta^(n-1) samples are effective; summed term by term.
    effective = np.array([np.sum(beta ** np.arange(n, dtype=np.float64)) for n in counts])
    expected = 1 / effective / np.mean(1 / effective)
    np.testing.assert_allclose(class_weights(counts, "effective", beta), expected, rtol=1e-5)


@given(
    st.lists(st.lists(st.integers(0, 50_000), min_size=3, max_size=3), min_size=1, max_size=6).filter(np.any),
    st.integers(2, 9),
)
def test_the_effective_number_is_that_of_a_case_with_the_class(counts: list[list[int]], times: int) -> None:
    """Of the totals of a data set it levelled off for every class, and all weights were 1."""
    found = [[case[index] for case in counts if case[index]] for index in range(3)]
    means = [sum(sizes) / len(sizes) if sizes else 0 for sizes in found]
    expected = class_weights(means, "effective").numpy()
    for table in (counts, counts * times, [*counts, *([[0, 0, 0]] * times)]):
        np.testing.assert_allclose(class_weights(table, "effective"), expected, rtol=1e-5)


def test_classes_above_fifty_thousand_voxels_a_case_weigh_alike() -> None:
    """The number of docs/losses.md, five times that at which the weights level off."""
    for beta, least in ((0.9999, 50_000), (0.999, 5_000)):
        assert class_weights([[1e9, least]] * 5, "effective", beta).numpy() == pytest.approx(1, abs=0.005)
        assert class_weights([[1e9, least / 5]] * 5, "effective", beta)[1] > 1.2


@pytest.mark.parametrize("method", ["inverse", "median", "effective"])
def test_an_absent_class_weighs_nothing_and_is_not_averaged(method: str) -> None:
    weights = class_weights([[90, 0, 10], [95, 0, 5]], method)
    assert weights[1] == 0
    np.testing.assert_allclose(weights[[0, 2]], class_weights([[90, 10], [95, 5]], method), rtol=1e-6)


def test_weights_feed_a_loss() -> None:
    labels = torch.tensor([[[0, 0, 0, 1]]])
    loss = WeightedCrossEntropyLoss(weight=class_weights(count_voxels([labels[0]])))
    # Inverse frequency makes both classes count alike: the mean of the class means.
    logits = torch.tensor([[[1.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])
    entropy = -logits.log_softmax(1)
    expected = (entropy[0, 0, :3].mean() + entropy[0, 1, 3]) / 2
    torch.testing.assert_close(loss(logits, labels), expected)


BAD = [
    ({"counts": [1, -2]}, ValueError, "every one of `counts` to be finite and at least 0, but got -2.0"),
    ({"counts": [1.0, float("nan")]}, ValueError, "to be finite and at least 0, but got nan"),
    ({"counts": [0, 0]}, ValueError, "`counts` to hold at least one voxel, but got 0 for every class"),
    ({"counts": []}, ValueError, "`counts` to have shape (C,) or (N, C), but got (0,)"),
    ({"counts": np.ones((1, 1, 1))}, ValueError, "`counts` to have shape (C,) or (N, C), but got (1, 1, 1)"),
    ({"counts": ["a"]}, TypeError, "`counts` to be numbers of shape (C,) or (N, C), but got list"),
    ({"counts": [1], "method": "log"}, ValueError, "`method` to be one of 'inverse', 'median', 'effective'"),
    ({"counts": [1], "beta": 1.0}, ValueError, "`beta` to be at least 0 and below 1, but got 1.0"),
]


@pytest.mark.parametrize(("arguments", "kind", "text"), BAD)
def test_bad_arguments(arguments: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        class_weights(**arguments)


def test_count_voxels_reads_every_form_of_item() -> None:
    label = torch.tensor([[[0, 2], [2, 1]]])
    maps = torch.stack([(label[0] == value).float() for value in range(3)])
    dictionary = Dataset([{"label": label}, {"label": label.numpy().astype(np.uint8)}])
    for dataset in (dictionary, [label, label.float()], [(label, label), (label, maps)]):
        assert count_voxels(dataset).tolist() == [[1, 1, 2]] * 2
    assert count_voxels([[{"label": label}, {"label": label[:, :1]}]]).tolist() == [[2, 1, 3]]
    assert count_voxels([{"seg": label}], num_classes=5, key="seg").tolist() == [[1, 1, 2, 0, 0]]


def test_count_voxels_names_what_is_wrong() -> None:
    label = torch.tensor([[0, 3]])
    with pytest.raises(ValueError, match="labels below `num_classes` = 2, but got 3"):
        count_voxels([label], num_classes=2)
    with pytest.raises(ValueError, match="item 1 of `dataset` to hold class numbers from 0, but got -3"):
        count_voxels([label, -label])
    with pytest.raises(ValueError, match=re.escape("item 0 of `dataset` to hold class numbers from 0, but got 1.5")):
        count_voxels([label / 2])
    with pytest.raises(TypeError, match=re.escape("to hold 'label', but got ['image']: set `key` to")):
        count_voxels([{"image": label}])
    with pytest.raises(TypeError, match="but got str: use a dataset that loads its labels"):
        count_voxels(["case.nii.gz"])
    with pytest.raises(ValueError, match="it is empty"):
        count_voxels([])
    with pytest.raises(TypeError, match="item 0 of `dataset` to hold a label array, but got list: use a dataset"):
        count_voxels([[]])
    unsigned = np.array([[0, 1, 2**32 - 1]], dtype=np.uint32)  # -1 without its sign: a table of 32 GB
    with pytest.raises(
        ValueError, match="item 0 of `dataset` to hold class numbers below 65536, but got 4294967295: map"
    ):
        count_voxels([unsigned])
    assert count_voxels([np.array([[2**16 - 1]])]).shape == (1, 2**16)
    with pytest.raises(TypeError, match="`num_classes` to be an integer, but got str: count the background too"):
        count_voxels([label], num_classes="4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`num_classes` to be at least 1, but got 0: count the background too"):
        count_voxels([label], num_classes=0)


def test_count_voxels_takes_no_regions_and_no_missing_channel_for_maps() -> None:
    label = torch.zeros(1, 8, 8)
    label[0, 1:3, 1:3] = label[0, 5:7, 5:7] = 1
    regions = ComponentRegionsd("label")({"label": label})["label"]
    numbers = torch.arange(36).reshape(6, 6) % 4
    for wrong, first in (
        (regions, "2"),
        (numbers, "2"),
        (-numbers, "-1"),
        (torch.full((2, 3), torch.nan), "nan"),
    ):
        remedy = "pass label[:1] of a label with the regions of its components, or label[None] of a label map without"
        with pytest.raises(
            ValueError, match=f"item 0 of `dataset`.* from 0 to 1, but got {first}: {re.escape(remedy)}"
        ):
            count_voxels([{"label": wrong}])
    assert torch.equal(count_voxels([regions[:1]]), count_voxels([label]))
    assert count_voxels([numbers[None]]).tolist() == [[9, 9, 9, 9]]
    soft = torch.tensor([[0.75, 0.5, 0.0], [0.25, 0.5, 1.0]])
    assert count_voxels([soft]).tolist() == [[1, 2]]
    with pytest.raises(ValueError, match="item 0 of `dataset` to hold class numbers from 0, but got nan"):
        count_voxels([torch.tensor([[0.0, torch.nan]])])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint16, torch.bool, torch.float64])
def test_count_voxels_of_every_dtype(dtype: torch.dtype) -> None:
    label = torch.tensor([[0, 1, 1, 0, 1]])
    assert count_voxels([label.to(dtype)]).tolist() == [[2, 3]]
    assert count_voxels([torch.cat([1 - label, label]).to(dtype)]).tolist() == [[2, 3]]
    assert count_voxels([label.to(dtype).numpy() if dtype != torch.bfloat16 else label.numpy()]).tolist() == [[2, 3]]
    assert torch.equal(class_weights(torch.tensor([1, 1]).to(dtype)), torch.ones(2))
    if dtype.is_floating_point:
        assert count_voxels([label.to(dtype).requires_grad_()]).tolist() == [[2, 3]]


@pytest.mark.parametrize("factor", [0.99999994, 1.00001, 1.00004, 0.99996])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_count_voxels_rounds_labels_as_the_transforms_do(factor: float, dtype: torch.dtype) -> None:
    label = torch.tensor([[0, 1, 1, 0, 2, 2, 2]], dtype=dtype)
    scaled = label * factor
    scaled[0, 0], scaled[0, 3] = 5e-5, -5e-5
    assert not (scaled == label).any(0).all()
    assert count_voxels([scaled, scaled.numpy()]).tolist() == [[2, 2, 3]] * 2
    assert np.bincount(whole_numbers(scaled[0].numpy())).tolist() == [2, 2, 3]


@pytest.mark.parametrize("value", [0.5, 1.001, 0.9997, -1, -0.001, 1e30, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_count_voxels_refuses_what_no_rounding_explains(value: float, dtype: type[np.floating[Any]]) -> None:
    label = np.array([[0, 1, value, 2]], dtype=dtype)
    text = f"Expected item 0 of `dataset` to hold class numbers from 0, but got {label[0, 2]}: map the labels to"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        count_voxels([label])


def write(path: Path, array: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(np.asarray(array), np.eye(4)).to_filename(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    first = np.zeros((10, 10, 10), dtype=np.uint8)
    first[1:3, 1:3, 1:3] = 1
    first[6:8, 6:8, 6:8] = 1
    first[5, 0, 0] = 4
    write(tmp_path / "labelsTr" / "first.nii.gz", first)
    write(tmp_path / "labelsTr" / "more" / "second.nii", np.zeros((10, 10, 10), dtype=np.float32))
    return tmp_path / "labelsTr"


def test_label_files(folder: Path) -> None:
    counts = count_label_files(folder)
    assert counts.values == (0, 1, 4)
    assert counts.cases == ("first", "second")
    assert counts.voxels.tolist() == [[983, 16, 1], [1000, 0, 0]]
    assert counts.components.tolist() == [0, 2, 1]


def test_dataset_json_beside_the_folder_names_the_values(folder: Path) -> None:
    description = folder.parent / "dataset.json"
    description.write_text(json.dumps({"labels": {"0": "background", "1": "a", "3": "absent", "4": "b"}}))
    assert count_label_files(folder).values == (0, 1, 3, 4)
    assert count_label_files(folder, [0, 1, 4]).values == (0, 1, 4)
    description.write_text(json.dumps({"labels": {"0": "background", "1": "a"}}))
    with pytest.raises(ValueError, match=r"first.nii.gz` to hold only labels 0 and 1, but got 4: correct the file"):
        count_label_files(folder)
    description.write_text("{")
    with pytest.raises(ValueError, match=r"dataset.json to be JSON, but it cannot be read"):
        count_label_files(folder)


def test_command_prints_a_table_and_writes_what_a_config_reads(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "weights.json"
    assert main(["class-weights", str(folder), "--output", str(output)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "2 label files, weights: inverse"
    assert printed[1].split() == ["class", "voxels", "%", "cases", "components", "weight"]
    expected = class_weights([1983, 16, 1]).tolist()
    assert printed[3].split() == ["1", "16", "0.8000", "1", "2", f"{expected[1]:.6f}"]
    content = json.loads(output.read_text())
    assert content["weights"] == pytest.approx(expected, abs=1e-6)
    assert (content["labels"], content["voxels"], content["components"]) == ([0, 1, 4], [1983, 16, 1], [0, 2, 1])
    parser = ConfigParser()
    parser.read_config({"loss": {"_target_": "monai_iou.WeightedCrossEntropyLoss", "weight": f"%{output}::weights"}})
    assert parser.get_parsed_content("loss").class_weight.tolist() == pytest.approx(expected, abs=1e-6)
    assert printed[-1].endswith(f'"weight": "%{output}::weights"')


@pytest.mark.parametrize(
    "name", ["w.json", "x #1/w.json", "a@b/w.json", "50%/w.json", "%::a/w.json", "it's/w.json", "\u00e4#1/w.json"]
)
def test_what_the_command_prints_for_a_config_is_read_from_that_file(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / name
    assert main(["class-weights", str(folder), "--output", str(output)]) == 0
    _, _, printed = capsys.readouterr().out.rpartition('In a config: "weight": ')
    parser = ConfigParser()
    parser.read_config({"loss": {"_target_": "monai_iou.WeightedCrossEntropyLoss", "weight": json.loads(printed)}})
    found = parser.get_parsed_content("loss").class_weight.tolist()
    assert found == pytest.approx(json.loads(output.read_text())["weights"], abs=1e-6)


def test_command_weighs_the_cases_of_a_dataset_as_its_plan_does(tmp_path: Path) -> None:
    """Three cases, of which two hold 500 voxels of a lesion; a plan gives 0.093 and 1.907."""
    rng = np.random.default_rng(0)
    label = np.zeros((60, 60, 60), np.uint8)
    label[10:20, 10:20, 10:15] = 1
    pairs = []
    for case in range(3):
        write(tmp_path / "labelsTr" / f"c{case}.nii.gz", label if case else np.zeros_like(label))
        write(tmp_path / "imagesTr" / f"c{case}.nii.gz", rng.normal(size=label.shape).astype(np.float32))
        pairs.append({"image": f"imagesTr/c{case}.nii.gz", "label": f"labelsTr/c{case}.nii.gz"})
    description = {"modality": {"0": "MR"}, "labels": {"0": "background", "1": "lesion"}, "training": pairs}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    weights, plan = tmp_path / "weights.json", tmp_path / "plan.json"
    assert main(["class-weights", str(tmp_path / "labelsTr"), "--method", "effective", "-o", str(weights)]) == 0
    assert main(["plan", str(tmp_path), "-o", str(plan), "--device", "cpu", "--memory-gb", "8"]) == 0
    planned = json.loads(plan.read_text())["class_weights"]
    assert json.loads(weights.read_text())["weights"] == pytest.approx(planned, abs=1e-4)
    assert planned == pytest.approx([0.093, 1.907], abs=1e-3)


def test_command_fails_in_one_sentence_and_leaves_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "weights.json"
    (folder / "broken.nii.gz").write_bytes(b"\x1f\x8b not a volume")
    assert main(["class-weights", str(folder), "--output", str(output)]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"Error: Expected `.*broken.nii.gz` to be a readable volume, but got .*\n", error)
    assert not output.exists()
    assert main(["class-weights", str(tmp_path / "none"), "--output", str(output)]) == 2
    assert "Expected LABELS_DIR to be a folder of label files, but got `" in capsys.readouterr().err
    with pytest.raises(ValueError, match="to be a folder of label files, but there is no such folder"):
        count_label_files(tmp_path / "none")
    assert main(["class-weights", str(folder), "--method", "log"]) == 2


@pytest.mark.real_data
def test_real_labels(tmp_path: Path) -> None:
    labels = DATA / "Task901_MSLesionFLAIR" / "labelsTr"
    if not labels.is_dir():
        pytest.skip(f"{labels} is not there")
    counts = count_label_files(labels)
    assert len(counts.cases) == 6
    assert 0.0001 < counts.voxels[:, 1].sum() / counts.voxels.sum() < 0.01
    assert counts.components[1] > 100


@pytest.mark.real_data
def test_the_documents_example_is_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = DATA / "Task904_Hippocampus" / "labelsTr"
    if not labels.is_dir():
        pytest.skip(f"{labels} is not there")
    text = (DOCS / "losses.md").read_text(encoding="utf-8")
    command, printed = text.split("$ monai-iou class-weights labelsTr ")[1].split("```")[0].split("\n", 1)
    monkeypatch.chdir(tmp_path)
    assert main(["class-weights", str(labels), *command.split()]) == 0
    assert capsys.readouterr().out == printed


def test_one_file_is_no_plural(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "more" / "second.nii").unlink()
    assert main(["class-weights", str(folder), "-o", str(tmp_path / "weights.json")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "1 label file, weights: inverse"


@pytest.mark.parametrize("loader", [DataLoader, MonaiLoader])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_images_of_a_loaders_batches_are_cases(loader: type[DataLoader], size: int) -> None:
    """As many maps as classes: the images of a batch were taken for the classes."""
    for shape in ((1, 4, 5, 6), (1, 4, 5), (2, 4, 5, 6)):
        label = torch.zeros(shape)
        label[0].view(-1)[:2] = 1
        label[1:] = 1 - label[:1]
        items = [{"label": label}, {"label": 1 - label}, {"label": label}]
        assert count_voxels(loader(items, batch_size=size)).tolist() == count_voxels(items).tolist()
    pairs = [(label, label) for label in torch.tensor([[[0, 1, 1]], [[0, 0, 1]]])]
    assert count_voxels(DataLoader(pairs, batch_size=size)).tolist() == [[1, 2], [2, 1]]
    one = DataLoader(items, batch_size=1, collate_fn=lambda batch: batch[0])
    assert count_voxels(one).tolist() == count_voxels(items).tolist()
    assert count_voxels(DataLoader(items, batch_size=None)).tolist() == count_voxels(items).tolist()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_collate_function_of_any_form_makes_no_classes_of_images(size: int) -> None:
    """Of 2D labels: a batch (B, 1, H, W) has the shape of per-class maps of a volume."""
    torch.manual_seed(0)
    items = [{"label": (torch.rand(1, 6, 5) < 0.1 * share).float()} for share in (1, 3, 5)]
    expected = count_voxels(items).tolist()
    known = [PadListDataCollate(), pad_list_data_collate, functools.partial(pad_list_data_collate, mode="constant")]
    as_they_are: list[Any] = [list, tuple, lambda batch: batch, functools.partial(sorted, key=lambda item: 0)]
    for collate in (*known, *as_they_are):
        assert count_voxels(DataLoader(items, batch_size=size, collate_fn=collate)).tolist() == expected
    pairs = [(item["label"], item["label"]) for item in items]
    assert count_voxels(DataLoader(pairs, batch_size=size, collate_fn=list)).tolist() == expected
    plain = [item["label"] for item in items]
    assert count_voxels(DataLoader(plain, batch_size=size, collate_fn=lambda batch: batch)).tolist() == expected
    unknown: list[Any] = [
        lambda batch: {"label": torch.stack([item["label"] for item in batch])},
        lambda batch: torch.cat([item["label"] for item in batch]),
        lambda batch: [item["label"] for item in batch],
        lambda batch: list(zip(*[item.values() for item in batch], strict=True)),
        lambda batch: [torch.stack(labels) for labels in zip(*[item.values() for item in batch], strict=True)],
    ]
    message = (
        "Expected a DataLoader in `dataset` to have a collate function of torch or MONAI, but got another, whose "
        "batches may hold images along any axis: give `dataset.dataset`, which holds single items."
    )
    for collate in unknown:
        loader = DataLoader(items, batch_size=size, collate_fn=collate)
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            count_voxels(loader)
        assert count_voxels(loader.dataset).tolist() == expected


def test_a_batch_that_is_made_by_hand_is_refused() -> None:
    label = torch.zeros(1, 4, 5, 6)
    text = (
        "Expected item 1 of `dataset` to hold a label (1, *S) or (C, *S) with up to 3 spatial dimensions, but got the "
        "shape (2, 1, 4, 5, 6), which is that of a batch: give one case at a time."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        count_voxels([label, torch.stack([label, label])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_count_voxels_rounds_shares_that_leave_their_range(dtype: torch.dtype) -> None:
    maps = torch.tensor([[1.0000001, 1.00005, -1e-7, 0], [0, -5e-5, 1, 1]], dtype=dtype)
    assert count_voxels([maps, maps.numpy()]).tolist() == [[2, 2]] * 2
    row = torch.full((2, 100_000), 1.00009, dtype=dtype)
    assert count_voxels([row]).tolist() == [[100_000] * 2]
    for wrong in (1.001, -0.001):
        with pytest.raises(ValueError, match=rf"to hold values from 0 to 1, but got {wrong}"):
            count_voxels([torch.full((2, 3), wrong, dtype=dtype)])
