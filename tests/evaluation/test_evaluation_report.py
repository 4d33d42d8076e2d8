from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest

from monai_iou.evaluation import case_table, pictures, thumbnails
from monai_iou.evaluation.charts import bland_altman, curve, distribution, forest, paired, recall_chart
from monai_iou.evaluation.columns import COLUMNS
from monai_iou.evaluation.evaluate import evaluate_folders
from monai_iou.evaluation.masks import mask_pairs
from monai_iou.evaluation.results import Request
from monai_iou.evaluation.rules import Structure
from monai_iou.evaluation.statistics import dataset_scores
from monai_iou.evaluation.svg import MANY_DOTS, NAMED_DOTS, Axis, Point
from monai_iou.evaluation.thumbnails import CODE_STEP, MAX_SIZE, codes_of, show_picture, take_picture
from monai_iou.volumes.grid import Grid
from monai_iou.volumes.reading import VolumeError

EVIL = "<script>document.title='owned'</script>"  # a case's name is a path: the slash makes a folder


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The report of four cases with images, one of them with a dangerous name and one that fails."""
    folder = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    for i, name in enumerate(["alpha", "beta", "gamma", EVIL]):
        reference = np.zeros((24, 20, 16), np.uint8)
        reference[4:14, 5:12, 4:10] = 1
        reference[16:20, 4:8, 6:12] = 2
        prediction = np.roll(reference, i, axis=0)
        image = (reference * 100 + rng.normal(0, 10, reference.shape)).astype(np.float32)
        for kind, array in (("references", reference), ("predictions", prediction), ("images", image)):
            path = folder / kind / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, np.diag([-1.0, -1.0, 2.0, 1.0])), path)
    (folder / "predictions" / "gamma.nii.gz").write_bytes(b"broken")
    request = Request(folder / "predictions", folder / "references", folder / "out", images=folder / "images")
    evaluate_folders(request)
    return folder / "out" / "report.html"


def test_page_holds_everything_and_asks_for_nothing(report):
    page = report.read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", page)
    assert "http:" not in page
    assert "https:" not in page
    assert "default-src 'none'" in page
    assert "3 of 4 cases evaluated" in page
    assert "1 of 4 cases could not be evaluated" in page
    assert page.count('class="viewer"') == 6  # the worst five and the best
    assert "base-uri 'none'; form-action 'none'" in page


def test_names_are_escaped_everywhere(report):
    page = report.read_text(encoding="utf-8")
    assert EVIL not in page
    assert "<script>document" not in page
    assert "&lt;script&gt;document.title=" in page


def test_only_undefined_scores_make_a_report(tmp_path):
    array = np.zeros((4, 4, 4), np.uint8)
    for kind in ("references", "predictions"):
        (tmp_path / kind).mkdir()
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / kind / "a.nii")
    request = Request(tmp_path / "predictions", tmp_path / "references", tmp_path / "out", labels=(1,))
    evaluate_folders(request)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "No case has a structure to show." in page
    assert not re.search(r">\s*-?(nan|inf)\b", page)


@pytest.mark.parametrize("present", ["reference", "either"])
def test_the_worst_cases_are_among_those_that_the_mean_counts(tmp_path, present):
    """Ten cases with IoU 0.8, and ten without a lesion in which one is predicted."""
    for i in range(20):
        reference, prediction = np.zeros((2, 8, 6, 4), np.uint8)
        reference[1:6, 2, 2] = i < 10
        prediction[1:5, 2, 2] = 1
        for kind, array in (("references", reference), ("predictions", prediction)):
            (tmp_path / kind).mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / kind / f"c{i}.nii")
    folders = [tmp_path / name for name in ("predictions", "references", "out")]
    done = evaluate_folders(Request(*folders, present=present))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert '<span class="what">1</span><b>IoU 0.400</b>' in page
    assert '<span class="what">Worst 10 % of cases</span><b>IoU 0.000</b>' in page
    assert dataset_scores(done.averaged, present="either")["iou_i_worst_10"] == 0
    assert done.summary["dataset"]["iou_i_worst_10"] == pytest.approx(0.8 if present == "reference" else 0)


def test_images_that_are_not_there_are_told_and_fail_nothing(report, tmp_path):
    folder = report.parents[1]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "alpha.nii.gz").write_bytes(b"broken")
    request = Request(folder / "predictions", folder / "references", tmp_path / "out", images=tmp_path / "images")
    assert len(evaluate_folders(request).failures) == 1
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "No image named beta in the images folder." in page
    assert "alpha.nii.gz` to be a readable volume" in page
    (tmp_path / "nothing").mkdir()
    evaluate_folders(Request(**{**vars(request), "images": tmp_path / "nothing"}))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"Expected volumes in `{tmp_path / 'nothing'}`, but got none" in page


def test_a_folder_of_images_that_may_not_be_read_fails_nothing(report, tmp_path, monkeypatch):
    def unreadable(*_: object) -> None:
        message = "Expected `images/site` to be readable, but got the error 'Permission denied': ask for the right."
        raise VolumeError(message)

    monkeypatch.setattr(pictures, "find_volumes", unreadable)
    folder = report.parents[1]
    evaluate_folders(Request(folder / "predictions", folder / "references", tmp_path / "out", images=folder))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Expected `images/site` to be readable, but got the error" in page


def pixels_of(uri: str) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def picture_of(prediction: np.ndarray, reference: np.ndarray, grid: Grid, whole: bool = True) -> dict | None:
    """The picture of two masks, given as the whole volume or cut to the structure's box."""
    maps = [mask.astype(np.uint8) for mask in (prediction, reference)]
    pair = next(mask_pairs(*maps, [Structure("1", (1,))], 9 if whole else None))
    return take_picture(pair, grid)


@pytest.mark.parametrize(("whole", "changed"), [(True, 0), (False, 0), (True, 1), (True, -1)])
def test_crop_holds_both_masks_in_patient_axes(whole, changed):
    """Also where a browser that hides its fingerprint changes the lowest bits of the pixels that the page reads."""
    pytest.importorskip("PIL", reason="Pillow is not installed")
    reference = np.zeros((60, 50, 40), bool)
    reference[20:25, 10:12, 30:33] = True
    prediction = np.roll(reference, 3, axis=0)
    grid = Grid(reference.shape, np.array([[0, 0, -2.0, 90], [-1, 0, 0, 9], [0, 1, 0, 3], [0, 0, 0, 1]]))
    picture = picture_of(prediction, reference, grid, whole)
    assert picture is not None
    assert not picture["cut"]
    crop = show_picture(picture, None)
    assert tuple(crop["spacing"]) == (2.0, 1.0, 1.0)
    greys = np.clip(pixels_of(crop["masks"]).astype(int) + changed, 0, 255)
    sheet = np.rint(greys / CODE_STEP).astype(np.uint8)
    x, y, z = crop["shape"]
    tiles = [sheet[k // crop["columns"] * y :, k % crop["columns"] * x :][:y, :x].T for k in range(z)]
    codes = np.stack(tiles, axis=-1)
    np.testing.assert_array_equal(codes, codes_of(picture))
    assert [(codes == code).sum() for code in (1, 2, 3)] == [18, 18, 12]
    # Every voxel of the crop names its own voxel of the file, and its own place.
    for index in np.argwhere(codes):
        file = [0, 0, 0]
        for i, (axis, size, start, step) in zip(index, picture["file"], strict=True):
            file[axis] = start + step * int(i)
            assert 0 <= file[axis] < size == reference.shape[axis]
        assert reference[tuple(file)] == bool(codes[tuple(index)] & 1)
        assert prediction[tuple(file)] == bool(codes[tuple(index)] & 2)
        here = np.asarray(picture["affine"]) @ [*index, 1]
        np.testing.assert_allclose(here, grid.affine @ [*file, 1])


def test_the_page_reads_the_codes_as_they_were_written():
    script = (Path(thumbnails.__file__).parent / "templates" / "viewer.js").read_text(encoding="utf-8")
    assert f"const CODE_STEP = {CODE_STEP};" in script
    assert 3 * CODE_STEP == 255


def test_crops_end_with_the_image():
    reference = np.zeros((30, 30, 3), bool)
    reference[0:2, 27:30, :] = True
    picture = picture_of(reference, reference, Grid(reference.shape, np.eye(4)))
    assert picture is not None
    assert picture["shape"] == [14, 15, 3]
    assert [axis[2] for axis in picture["file"]] == [0, 15, 0]


def test_large_crops_are_cut_around_the_disagreement():
    reference = np.zeros((300, 8, 8), bool)
    reference[5:295, 3:5, 3:5] = True
    prediction = reference.copy()
    prediction[240:250] = False
    picture = picture_of(prediction, reference, Grid(reference.shape, np.eye(4)))
    assert picture is not None
    assert picture["cut"]
    assert picture["shape"][0] == MAX_SIZE
    assert (codes_of(picture) == 1).sum() == 10 * 4
    nothing = np.zeros_like(reference)
    assert picture_of(nothing, nothing, Grid(reference.shape, np.eye(4))) is None


def test_image_values_come_back_through_the_window(tmp_path):
    pytest.importorskip("PIL", reason="Pillow is not installed")
    reference = np.zeros((10, 10, 6), bool)
    reference[4:6, 4:6, 2:4] = True
    values = np.linspace(-1000, 1000, reference.size, dtype=np.float32).reshape(reference.shape)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "image.nii")
    picture = picture_of(reference, reference, Grid(reference.shape, np.eye(4)))
    assert picture is not None
    crop = show_picture(picture, tmp_path / "image.nii")
    low, high = crop["window"]
    x, y, z = crop["shape"]
    sheet = pixels_of(crop["image"]).astype(float)
    tiles = [sheet[k // crop["columns"] * y :, k % crop["columns"] * x :][:y, :x].T for k in range(z)]
    seen = low + np.stack(tiles, axis=-1) / 255 * (high - low)
    assert np.abs(seen - np.clip(values, low, high)).max() <= (high - low) / 255
    nibabel.save(nibabel.Nifti1Image(np.stack([values, -values], -1), np.eye(4)), tmp_path / "channels.nii")
    assert show_picture(picture, tmp_path / "channels.nii") == crop  # the first of several channels


def test_ticks_are_round_and_inside():
    for low, high in ((0.0, 1.0), (-3.7, 12.2), (0.0, 2.6e-4), (0.0, 3456.0)):
        ticks = Axis(low, high, 0, 100).ticks()
        assert 3 <= len(ticks) <= 9
        assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.7, 12.2), (-2.0, 2.0), (0.0, 3456.0)])
def test_ticks_of_small_numbers_are_those_of_large_ones(low, high):
    small = Axis(low * 1e-12, high * 1e-12, 0, 100).ticks()
    assert [tick * 1e12 for tick in small] == pytest.approx(Axis(low, high, 0, 100).ticks())


def test_small_volumes_have_bins_and_places_of_their_own():
    """A voxel of 0.01 mm has 1e-6 mm3, which are 1e-9 ml."""
    chart = recall_chart([(volume, True) for volume in (2e-6, 5e-5, 3e-4, 2e-3, 0.0)], "mm")
    bins = [("1e-6", "1e-5"), ("1e-5", "0.0001"), ("0.0001", "0.001"), ("0.001", "0.01")]
    assert re.findall(r">([^<>]*) to ([^<>]*)</text>", chart) == bins
    assert re.findall(r"<title>(.*?)</title>", chart)[0] == "2 of 2 lesions found", "that of no volume is the smallest"
    volumes = [(2.0, 0.5), (5.0, -0.25), (8.0, 0.125)]
    for points in (volumes, volumes[:1]):
        places = [
            re.findall(r'cx="(.*?)" cy="(.*?)"', bland_altman([Point(x * scale, y * scale, "") for x, y in points]))
            for scale in (1.0, 2.0**-30)
        ]
        assert places[0] == places[1]
        assert len(set(places[0])) == len(points)


def test_charts_of_nothing_and_of_one_value_are_charts():
    for chart in (
        distribution({}, "IoU", True),
        distribution({"1": []}, "HD95, mm", False),
        distribution({"1": [Point(0.0, 0.0, "a")]}, "HD95, mm", False),
        recall_chart([], "mm"),
        recall_chart([(0.0, True), (10.0, False), (9.99, True)], "mm"),
        bland_altman([]),
        paired([], "a", "b", COLUMNS["iou"]),
        paired([Point(0.2, 0.4, "a")], "<a>", "b", COLUMNS["hd95_mm"]),
        forest([("IoU", 0.1, None, None, "")], "x"),
        bland_altman([Point(1.0, 0.0, "a")]),
    ):
        assert chart.startswith("<svg")
        assert "nan" not in chart
        assert "inf" not in chart
    assert "<title>1 of 1 lesions found</title>" in recall_chart([(10.0, True), (9.99, False)], "mm")
    # 10 voxels of 1 mm^3 on a grid turned by 0.01 rad, its affine in float32
    assert "<title>1 of 1 lesions found</title>" in recall_chart([(9.99999983, True), (9.99, False)], "mm")
    assert "b is better in 1 case, worse in 0" in paired([Point(0.2, 0.4, "x")], "a", "b", COLUMNS["iou"])
    assert "b is better in 0 cases, worse in 1" in paired([Point(0.4, 0.2, "x")], "a", "b", COLUMNS["iou"])


def test_very_many_dots_are_one_path_and_the_far_ones_keep_their_names():
    values = np.random.default_rng(0).random(MANY_DOTS + 50)
    points = [Point(float(v), float(v), f"case{i}") for i, v in enumerate(values)]
    chart = distribution({"1": points}, "IoU", True)
    assert chart.count("<circle") == NAMED_DOTS
    assert chart.count("h.01") == len(points) - NAMED_DOTS
    named = {int(i) for i in re.findall(r"<title>case(\d+)</title>", chart)}
    far = np.argsort(-np.abs(values - np.median(values)))[:NAMED_DOTS]
    assert named == set(far.tolist())
    assert distribution({"1": points[:MANY_DOTS]}, "IoU", True).count("<circle") == MANY_DOTS
    assert "<polyline" in curve({"a": points}, "x", "y", "z")


def test_names_that_are_no_text_are_escaped_and_rows_beyond_the_limit_are_the_worst(monkeypatch):
    monkeypatch.setattr(case_table, "MOST_ROWS", 2)
    rows = [{"case": f"{i}\udcff", "label": "1", "iou": iou} for i, iou in enumerate((0.5, float("nan"), 0.2, 0.9))]
    table = case_table.case_table(rows, {"iou": COLUMNS["iou"]}, {("2\udcff", "1"): 4})
    assert table["rows"] == [[4, "2\\udcff", "1", 0.2], [None, "0\\udcff", "1", 0.5]]
    assert table["left_out"] == 2


def test_limits_of_agreement_are_bland_and_altmans():
    rng = np.random.default_rng(0)
    differences = rng.normal(1, 2, 20)
    chart = bland_altman([Point(5.0, float(d), "") for d in differences])
    mean, spread = differences.mean(), 1.96 * differences.std(ddof=1)
    for value in (mean, mean + spread, mean - spread):
        assert f"{value:+.3g} ml" in chart
    assert "SD" not in bland_altman([Point(5.0, 1.0, ""), Point(5.0, 2.0, "")])
