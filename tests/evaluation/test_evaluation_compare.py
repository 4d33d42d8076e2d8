from __future__ import annotations

import html
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import permutation_test

from monai_iou.cli import main
from monai_iou.evaluation.columns import CASE_COLUMNS, FAILURE_COLUMNS
from monai_iou.evaluation.compare import METRICS, CompareError, compare_folders
from monai_iou.evaluation.paired_scores import read_evaluated
from monai_iou.evaluation.statistics import holm
from monai_iou.files import read_csv, write_csv, write_json


def evaluated(folder: Path, scores: dict[str, list[float | None]], cases: int = 12, label: str = "1") -> Path:
    """A folder with a cases.csv: the given columns, 0.5 in all others."""
    folder.mkdir()
    rows = [
        dict.fromkeys(CASE_COLUMNS, 0.5)
        | {name: values[i] for name, values in scores.items()}
        | {"case": f"case{i}", "label": label}
        for i in range(cases)
    ]
    write_csv(folder / "cases.csv", CASE_COLUMNS, rows)
    return folder


@pytest.fixture
def scores() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    first = rng.random(12)
    return first, first + rng.normal(0.05, 0.02, 12)


def test_differences_intervals_and_p_values(tmp_path, scores):
    first, second = scores
    a = evaluated(tmp_path / "a", {"iou": first.tolist(), "hd95_mm": first.tolist()})
    b = evaluated(tmp_path / "b", {"iou": second.tolist(), "hd95_mm": second.tolist()})
    rows = {row["metric"]: row for row in compare_folders([a, b], tmp_path / "out")}
    assert tuple(rows) == METRICS
    iou = rows["iou"]
    assert iou["difference"] == pytest.approx((second - first).mean())
    assert iou["low"] < iou["difference"] < iou["high"]
    expected = permutation_test(
        (second, first), lambda x, y: (x - y).mean(), permutation_type="samples", n_resamples=9999
    )
    assert iou["p"] == pytest.approx(expected.pvalue, abs=0.002)
    assert iou["p_holm"] == iou["p"]
    assert rows["dice"]["difference"] == 0
    assert rows["dice"]["p"] == 1
    assert (iou["better"], rows["hd95_mm"]["better"], rows["dice"]["better"]) == ("other", "", "")
    assert [row["family"] for row in rows.values()] == ["primary"] + ["exploratory"] * (len(METRICS) - 1)
    assert {row["p_holm"] for row in rows.values() if row["family"] == "exploratory"} == {None}


def test_a_single_case_has_its_difference_and_no_p_value(tmp_path, capsys):
    a, b = (evaluated(tmp_path / name, {"iou": [value]}, cases=1) for name, value in (("a", 0.75), ("b", 0.5)))
    assert main(["compare", str(a), str(b), "-o", str(tmp_path / "out"), "--metrics", "iou"]) == 0
    line = "b against a, label 1, IoU: -0.2500 (no interval with fewer than 8 cases), no p-value for a single case"
    assert capsys.readouterr().out.splitlines()[0] == line
    (row,) = read_csv(tmp_path / "out" / "comparison.csv")
    found = [row[name] for name in ("baseline_mean", "other_mean", "difference", "p", "p_holm", "better")]
    assert found == ["0.75", "0.5", "-0.25", "", "", ""]


def test_the_correction_counts_labels_and_pairs_of_folders(tmp_path, scores):
    first, second = scores
    third = np.clip(first + 0.004 * np.arange(12), 0, 1)
    values = zip("abc", (first, second, third), strict=True)
    folders = [evaluated(tmp_path / name, {"iou": column.tolist()}) for name, column in values]
    rows = [row for row in compare_folders(folders, tmp_path / "out") if row["family"] == "primary"]
    assert [row["names"] for row in rows] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [row["p_holm"] for row in rows] == holm([row["p"] for row in rows])
    assert min(row["p_holm"] for row in rows) == pytest.approx(3 * min(row["p"] for row in rows))


def test_a_metric_that_is_named_twice_is_one_row(tmp_path, scores, capsys):
    folders = [str(evaluated(tmp_path / name, {"iou": values})) for name, values in zip("ab", scores, strict=True)]
    options = [f"--output={tmp_path / 'c'}", "--metrics=iou, dice,dice"]
    assert main(["compare", *folders, *options]) == 0
    assert [row["metric"] for row in read_csv(tmp_path / "c" / "comparison.csv")] == ["iou", "dice"]
    capsys.readouterr()
    assert main(["compare", *folders, f"--output={tmp_path / 'c'}", "--metrics="]) == 2
    assert "but got none: choose among these" in capsys.readouterr().err


def test_another_metric_can_be_primary(tmp_path, scores):
    a, b = (evaluated(tmp_path / name, {"hd95_mm": v.tolist()}) for name, v in zip("ab", scores, strict=True))
    for options in ({"primary": "hd95_mm"}, {"metrics": ["hd95_mm", "dice"]}):
        rows = compare_folders([a, b], tmp_path / "out", **options)
        assert (rows[0]["metric"], rows[0]["family"], rows[0]["better"]) == ("hd95_mm", "primary", "baseline")


def test_a_primary_metric_beside_the_others_is_compared_and_a_note_says_so(tmp_path, scores, capsys):
    folders = [str(evaluated(tmp_path / name, {"iou": values})) for name, values in zip("ab", scores, strict=True)]
    command = ["compare", *folders, f"--output={tmp_path / 'c'}"]
    note = "pq is compared as well as `--metrics`, because `--primary` names it."
    assert main([*command, "--metrics=iou", "--primary=pq"]) == 0
    rows = read_csv(tmp_path / "c" / "comparison.csv")
    assert [(row["metric"], row["family"]) for row in rows] == [("pq", "primary"), ("iou", "exploratory")]
    assert f"Note: {note}" in capsys.readouterr().err
    assert html.escape(note) in (tmp_path / "c" / "comparison.html").read_text(encoding="utf-8")
    for options in (["--metrics=iou,pq", "--primary=pq"], ["--primary=rq"], ["--metrics=pq"]):
        assert main([*command, *options]) == 0
        assert "Note:" not in capsys.readouterr().err
    assert main([*command, "--primary="]) == 2, "an empty name is no metric, and not the default"
    assert main([*command, "--metrics=speed,iou", "--primary=speed"]) == 2
    assert "but got speed: choose among these" in capsys.readouterr().err


def test_missing_is_not_better(tmp_path):
    """Six cases; the other method leaves the worst one empty: its distance is undefined, and must count."""
    distances = [1.0, 1.0, 1.0, 1.0, 1.0, 6.0]
    same = dict.fromkeys(("reference_ml", "prediction_ml"), [1.0] * 6) | {"diagonal_mm": [100.0] * 6}
    a = evaluated(tmp_path / "a", same | {"hd95_mm": distances}, cases=6)
    empty = same | {"prediction_ml": [1.0] * 5 + [0.0], "hd95_mm": [*distances[:5], None]}
    b = evaluated(tmp_path / "b", empty, cases=6)
    row = compare_folders([a, b], tmp_path / "out", ["hd95_mm"])[0]
    assert (row["n"], row["left_out"], row["low"]) == (6, 0, None)
    assert row["difference"] == pytest.approx((100 - 6) / 6)


def healthy_half(prediction: float, **scores: tuple[float | None, float | None]) -> dict[str, list[float | None]]:
    """Columns of twelve cases, of which the last six are healthy: each score there and in the others."""
    columns = {name: [sick] * 6 + [healthy] * 6 for name, (sick, healthy) in scores.items()}
    lesions = {name: [1.0] * 6 + [0.0] * 6 for name in ("lesion_tp", "reference_ml")}
    rest = {"prediction_ml": [1.0] * 6 + [prediction] * 6, "lesion_fp": [0.0] * 6 + [prediction] * 6}
    return {**columns, **lesions, **rest, "lesion_fn": [0.0] * 12, "diagonal_mm": [100.0] * 12}


def test_a_false_positive_in_a_healthy_case_is_worse_than_nothing(tmp_path):
    right = healthy_half(0.0, iou=(0.8, None), hd95_mm=(2.0, None), lesion_f1=(0.9, None))
    wrong = healthy_half(1.0, iou=(1.0, 0.0), hd95_mm=(0.0, None), lesion_f1=(1.0, 0.0))
    a, b = evaluated(tmp_path / "a", right), evaluated(tmp_path / "b", wrong)
    rows = {row["metric"]: row for row in compare_folders([a, b], tmp_path / "out", ["iou", "hd95_mm", "lesion_f1"])}
    found = {name: (row["n"], row["left_out"], row["baseline_mean"], row["other_mean"]) for name, row in rows.items()}
    assert found["iou"] == (12, 0, pytest.approx(0.9), 0.5)
    assert found["hd95_mm"] == (12, 0, 1.0, 50.0)
    assert found["lesion_f1"] == (12, 0, pytest.approx(0.95), 0.5)
    neither = evaluated(tmp_path / "c", right)
    row = compare_folders([a, neither], tmp_path / "out", ["iou"])[0]
    assert (row["n"], row["left_out"]) == (6, 6)
    compare_folders([a, neither, b], tmp_path / "out", ["iou"])
    ranking = {row["folder"]: (row["n"], float(row["mean"])) for row in read_csv(tmp_path / "out" / "ranking.csv")}
    assert ranking == {"a": ("12", pytest.approx(0.9)), "c": ("12", pytest.approx(0.9)), "b": ("12", 0.5)}
    paired = {row["case"]: (row["a"], row["b"]) for row in read_csv(tmp_path / "out" / "paired.csv")}
    assert paired["case11"] == ("", "0.0")


def test_a_healthy_case_that_failed_is_no_better_than_a_false_positive(tmp_path):
    a = evaluated(tmp_path / "a", healthy_half(0.0, iou=(0.8, None)), cases=11)
    write_csv(a / "failures.csv", FAILURE_COLUMNS, [{"case": "case11", "reason": "broken"}])
    b = evaluated(tmp_path / "b", healthy_half(1.0, iou=(1.0, 0.0)))
    row = compare_folders([a, b], tmp_path / "out", ["iou"])[0]
    assert (row["n"], row["baseline_mean"]) == (12, pytest.approx((6 * 0.8 + 5) / 12))


def test_a_column_that_an_earlier_version_did_not_write_is_filled_nowhere(tmp_path):
    a, b = (evaluated(tmp_path / n, healthy_half(v, iou=(0.8, w))) for n, v, w in (("a", 0.0, None), ("b", 1.0, 0.0)))
    rows = read_csv(a / "cases.csv")
    kept = [name for name in CASE_COLUMNS if name != "cc_iou"]
    write_csv(a / "cases.csv", kept, [{name: row[name] for name in kept} for row in rows])
    row = compare_folders([a, b], tmp_path / "out", ["iou", "cc_iou"])[1]
    assert (row["metric"], row["n"], row["left_out"]) == ("cc_iou", 0, 12)


def test_names_that_are_no_text_keep_their_patients_and_references(tmp_path):
    cases = {f"caf\udce9_{patient}_{visit}": f"P{patient}" for patient in range(5) for visit in range(2)}
    folders = []
    for name in "ab":
        (tmp_path / name).mkdir()
        rows = [{**dict.fromkeys(CASE_COLUMNS, 0.5), "case": case, "label": "1"} for case in list(cases)[1:]]
        write_csv(tmp_path / name / "cases.csv", CASE_COLUMNS, rows)
        write_csv(tmp_path / name / "failures.csv", FAILURE_COLUMNS, [{"case": next(iter(cases)), "reason": "broken"}])
        inputs = {case: {"reference": "0"} for case in cases}
        write_json(tmp_path / name / "summary.json", {"patients": cases, "inputs": inputs})
        folders.append(tmp_path / name)
    for one in read_evaluated(folders):
        assert {one.patient(case) for case, _ in one.scores} == set(cases.values())
        assert one.failed <= set(one.references) == set(cases)
    compare_folders(folders, tmp_path / "out", ["iou"])
    assert read_csv(tmp_path / "out" / "paired.csv")[0]["case"].startswith("caf\\udce9_")


def test_failed_cases_count_and_lone_ones_are_left_out(tmp_path, scores):
    first, second = (values.tolist() for values in scores)
    a = evaluated(tmp_path / "a", {"iou": first}, cases=10)
    b = evaluated(tmp_path / "b", {"iou": [None, *second[1:]]})
    notes: list[str] = []
    row = compare_folders([a, b], tmp_path / "out", ["iou"], note=notes.append)[0]
    assert (row["n"], row["left_out"]) == (10, 0)
    assert row["other_mean"] == pytest.approx(np.mean([0.0, *second[1:10]]))
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    note = f"`{a}` was not asked for 2 of the 12 cases of `{b}`, such as `case10`: they are left out."
    assert notes == [note]
    assert html.escape(note) in page
    write_csv(a / "failures.csv", FAILURE_COLUMNS, [{"case": f"case{i}", "reason": "broken"} for i in (10, 11)])
    row = compare_folders([a, b], tmp_path / "out", ["iou"])[0]
    assert row["n"] == 12
    assert row["baseline_mean"] == pytest.approx(np.mean([*first[:10], 0, 0]))
    paired = read_csv(tmp_path / "out" / "paired.csv")
    assert list(paired[0]) == ["case", "label", "a", "b"]
    assert [float(line["a"]) for line in paired if line["case"] == "case11"] == [0.0]


def test_a_case_that_both_folders_of_a_pair_failed_at_counts_where_a_third_one_has_it(tmp_path):
    """Four cases: the pair is compared on what the ranking is computed from, and not on the three that both have."""
    volumes = {"reference_ml": [1.0] * 4, "prediction_ml": [1.0] * 4, "diagonal_mm": [100.0] * 4}
    values = {"a": [0.0, 1.0, 1.0, 1.0], "b": [0.0, 0.6, 0.6, 0.6], "c": [0.5] * 4}
    a, b, c = (evaluated(tmp_path / n, volumes | {"iou": v, "hd95_mm": [9.0] * 4}, cases=4) for n, v in values.items())
    for folder in (a, b):
        rest = [row for row in read_csv(folder / "cases.csv") if row["case"] != "case0"]
        write_csv(folder / "cases.csv", CASE_COLUMNS, rest)
        write_csv(folder / "failures.csv", FAILURE_COLUMNS, [{"case": "case0", "reason": "broken"}])
    out = tmp_path / "out"
    for order in ([a, b, c], [c, a, b], [a, c, b]):
        rows = {(row["names"], row["metric"]): row for row in compare_folders(order, out, ["iou", "hd95_mm"])}
        row = rows[("a", "b"), "iou"]
        assert (row["n"], row["left_out"], row["difference"]) == (4, 0, pytest.approx(-0.3))
        assert rows[("a", "b"), "hd95_mm"]["baseline_mean"] == (100 + 27) / 4
        ranking = {line["folder"]: float(line["mean"]) for line in read_csv(out / "ranking.csv")}
        assert ranking["b"] - ranking["a"] == pytest.approx(row["difference"])
        assert next(line["a"] for line in read_csv(out / "paired.csv")) == "0.0"
    notes: list[str] = []
    row = compare_folders([a, b], out, ["iou"], note=notes.append)[0]
    assert (row["n"], row["left_out"], row["difference"]) == (3, 1, pytest.approx(-0.4))
    assert notes == [
        f"Cases that both `{a}` and `{b}` failed at, and of which no compared folder has a score: 1, such as `case0`. "
        "They are left out."
    ]
    assert html.escape(notes[0]) in (out / "comparison.html").read_text(encoding="utf-8")
    write_csv(a / "failures.csv", FAILURE_COLUMNS, [{"case": f"case{i}", "reason": "broken"} for i in range(4)])
    write_csv(b / "failures.csv", FAILURE_COLUMNS, [{"case": f"case{i}", "reason": "broken"} for i in range(4)])
    for folder in (a, b):
        write_csv(folder / "cases.csv", CASE_COLUMNS, [])
        write_json(folder / "summary.json", {"options": {"structures": {"1": [1]}}})
    row = compare_folders([a, b, c], out, ["iou"])[0]
    assert (row["n"], row["left_out"], row["difference"]) == (4, 0, 0.0), "only the third one has a score"
    with pytest.raises(CompareError, match="Expected cases in common, but got none"):
        compare_folders([a, b], out)


def test_patients_of_the_evaluation_are_the_unit(tmp_path, scores):
    a, b = (evaluated(tmp_path / name, {"iou": values.tolist()}) for name, values in zip("ab", scores, strict=True))
    alone = compare_folders([a, b], tmp_path / "out", ["iou"])[0]
    write_json(a / "summary.json", {"patients": {f"case{i}": f"p{i // 3}" for i in range(12)}})
    row = compare_folders([a, b], tmp_path / "out", ["iou"])[0]
    assert (row["difference"], row["low"]) == (alone["difference"], None)
    assert row["p"] == pytest.approx(2 / 2**4)


def test_patients_that_any_folder_names_are_the_unit_of_all(tmp_path, scores):
    first, second = (values.tolist() for values in scores)
    folders = [evaluated(tmp_path / name, {"iou": v}) for name, v in zip("abc", (first, second, second), strict=True)]
    patients = {f"case{i}": f"p{i // 3}" if i < 9 else f"case case{i}" for i in range(12)}
    found = []
    for named in ([0, 1, 2], [0], [1], [2], [1, 2]):
        for i, folder in enumerate(folders):
            write_json(folder / "summary.json", {"patients": patients if i in named else None})
        rows = compare_folders(folders, tmp_path / "out", ["iou"])
        page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
        assert "bootstrap intervals over patients, computed from 8 patients on" in page
        found.append(([(row["low"], row["p"]) for row in rows], read_csv(tmp_path / "out" / "ranking.csv")))
    assert found[0][0][0] == (None, pytest.approx(2 / 2**6))
    assert all(each == found[0] for each in found)
    alone = {f"case{i}": f"case case{i}" for i in range(12)}
    for folder in folders[1:]:
        write_json(folder / "summary.json", {"patients": alone | {"case11": "q"}})
    both = {**patients, "case11": "q"}
    write_json(folders[0] / "summary.json", {"patients": both})
    assert [(row["low"], row["p"]) for row in compare_folders(folders, tmp_path / "out", ["iou"])] == found[0][0]


def test_patients_that_contradict_each_other_are_refused(tmp_path, scores):
    folders = [evaluated(tmp_path / name, {"iou": v.tolist()}) for name, v in zip("ab", scores, strict=True)]
    for folder, patient in zip(folders, ("P1", "P2"), strict=True):
        write_json(folder / "summary.json", {"patients": {"case0": "P1", "case1": patient}})
    with pytest.raises(CompareError) as error:
        compare_folders(folders, tmp_path / "out")
    assert str(error.value) == (
        f"Expected every case to be of one patient, but got `case1` of P1 in `{folders[0]}` and of P2 in "
        f"`{folders[1]}`: evaluate both with the same `--groups`."
    )
    assert not (tmp_path / "out").exists()


def test_three_folders_are_ranked(tmp_path):
    rng = np.random.default_rng(5)
    base = rng.uniform(0.4, 0.6, 12)
    values = {"low": base - 0.2, "high": base + 0.2, "near": base + 0.2 + rng.normal(0, 0.05, 12)}
    folders = [evaluated(tmp_path / name, {"iou": v.tolist()}) for name, v in values.items()]
    compare_folders(folders, tmp_path / "out", ["iou"])
    ranking = read_csv(tmp_path / "out" / "ranking.csv")
    assert {row["rank"] for row in ranking} == {"1", "2", "3"}
    last = ranking[-1]
    assert (last["folder"], last["rank_low"], last["share_first"]) == ("low", "3.0", "0.0")
    assert float(ranking[0]["share_first"]) + float(ranking[1]["share_first"]) == pytest.approx(1.0)
    assert 0 < float(ranking[1]["share_first"]) < 0.5
    means = {row["folder"]: float(row["mean"]) for row in ranking}
    assert means == pytest.approx({name: v.mean() for name, v in values.items()})
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert "Ranking by mean IoU" in page


@pytest.mark.parametrize(("cases", "patients"), [(1, 1), (7, 7), (14, 7), (8, 8), (16, 8)])
def test_ranks_of_few_patients_have_no_interval(tmp_path, cases, patients):
    folders = [evaluated(tmp_path / name, {"iou": [0.9 - i / 10] * cases}, cases) for i, name in enumerate("abc")]
    if patients < cases:
        write_json(folders[0] / "summary.json", {"patients": {f"case{i}": f"p{i % patients}" for i in range(cases)}})
    rows = compare_folders(folders, tmp_path / "out", ["iou"])
    certain = [(r["rank_low"], r["rank_high"], r["share_first"]) for r in read_csv(tmp_path / "out" / "ranking.csv")]
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    unit = "cases" if cases == patients else "patients"
    assert f"over 2000 resamples of the {unit}, given from 8 {unit} on" in page
    if patients < 8:
        assert certain == [("", "", "")] * 3
        assert page.count(f"<td>fewer than 8 {unit}</td><td></td>") == 3
        assert "1 to 1" not in page
        assert "100 %" not in page
    else:
        assert certain == [("1.0", "1.0", "1.0"), ("2.0", "2.0", "0.0"), ("3.0", "3.0", "0.0")]
        assert "<td>1 to 1</td><td>100 %</td>" in page
    assert all((row["low"] is None) == (patients < 8) for row in rows)


def test_leaving_out_the_hard_cases_does_not_raise_a_rank(tmp_path):
    """Five easy and five hard cases; the third method is as good as the others, but has none of the hard ones."""
    hard = {"a": 0.5, "b": 0.3, "c": None}
    folders = [
        evaluated(tmp_path / name, {"iou": [0.7] * 5 + [score] * 5}, cases=10 if score else 5)
        for name, score in hard.items()
    ]
    lost = [{"case": f"case{i}", "reason": "no prediction"} for i in range(5, 10)]
    write_csv(folders[2] / "failures.csv", FAILURE_COLUMNS, lost)
    for order in (folders, folders[::-1]):
        rows = compare_folders(order, tmp_path / "out", ["iou"])
        ranking = read_csv(tmp_path / "out" / "ranking.csv")
        assert [(row["folder"], row["rank"], row["n"]) for row in ranking] == [
            ("a", "1", "10"), ("b", "2", "10"), ("c", "3", "10"),
        ]  # fmt: skip
        means = {row["folder"]: float(row["mean"]) for row in ranking}
        assert means == pytest.approx({"a": 0.6, "b": 0.5, "c": 0.35})
        for row in rows:
            assert [row["baseline_mean"], row["other_mean"]] == pytest.approx([means[name] for name in row["names"]])


def test_a_failed_case_has_no_score_of_a_label_that_its_folder_does_not_have(tmp_path):
    folders = [evaluated(tmp_path / name, {"iou": [0.5] * 12}) for name in "abc"]
    for folder in folders[:2]:
        more = (folder / "cases.csv").read_text(encoding="utf-8").replace(",1,", ",2,").split("\n", 1)[1]
        with (folder / "cases.csv").open("a", encoding="utf-8") as stream:
            stream.write(more)
    rest = [row for row in read_csv(folders[2] / "cases.csv") if row["case"] != "case3"]
    write_csv(folders[2] / "cases.csv", CASE_COLUMNS, rest)
    write_csv(folders[2] / "failures.csv", FAILURE_COLUMNS, [{"case": "case3", "reason": "broken"}])
    compare_folders(folders, tmp_path / "out", ["iou"])
    paired = {(row["case"], row["label"]): row["c"] for row in read_csv(tmp_path / "out" / "paired.csv")}
    assert (paired["case3", "1"], paired["case3", "2"]) == ("0.0", "")
    assert {row["label"] for row in read_csv(tmp_path / "out" / "ranking.csv")} == {"1"}


def test_names_that_tables_have_trouble_with_are_read_back(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        rows = [{**dict.fromkeys(CASE_COLUMNS, 0.5), "case": name, "label": "=1"} for name in ("x\ry", "-1+1", '"q",')]
        write_csv(tmp_path / folder / "cases.csv", CASE_COLUMNS, rows)
    rows = compare_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "out", ["iou"])
    assert (rows[0]["n"], rows[0]["label"]) == (3, "=1")
    assert {line["case"] for line in read_csv(tmp_path / "out" / "paired.csv")} == {"x\ry", "-1+1", '"q",'}


@pytest.mark.parametrize("listed", ["failures.csv", "summary.json"])
def test_tables_of_two_evaluations_are_not_compared(tmp_path, listed):
    """As an evaluation leaves them that was killed between its tables; rows of --missing penalty are no sign of it."""
    scores = {"iou": [0.0, 0.5], "prediction_ml": [0.0, 1.0], "reference_ml": [1.0, 1.0]}
    a, b = (evaluated(tmp_path / name, scores, cases=2) for name in ("a", "b"))
    for case in ("case0", "case1"):
        failures = [{"case": case, "reason": "broken", "prediction": "p", "reference": "r"}]
        if listed == "failures.csv":
            write_csv(b / listed, FAILURE_COLUMNS, failures)
        else:
            write_json(b / listed, {"failures": failures, "options": {"missing": "penalty"}})
        if case == "case0":
            assert compare_folders([a, b], tmp_path / "out", ["iou"])[0]["difference"] == 0
            continue
        with pytest.raises(CompareError) as caught:
            compare_folders([a, b], tmp_path / "out")
        assert str(caught.value) == (
            f"Expected one evaluation in `{b}`, but `case1` has a score in cases.csv and is a failure in other tables, "
            "as after an evaluation that was killed: evaluate into this folder again."
        )


def test_files_are_written_and_names_escaped(tmp_path, scores):
    a, b = (
        evaluated(tmp_path / name, {"iou": values.tolist()}) for name, values in zip(("a", "<b>"), scores, strict=True)
    )
    rows = compare_folders([a, b], tmp_path / "out")
    written = read_csv(tmp_path / "out" / "comparison.csv")
    assert [float(row["difference"]) for row in written] == [row["difference"] for row in rows]
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert page.count("<svg") == 3
    assert "base-uri 'none'; form-action 'none'" in page
    assert "http" not in page.replace("http-equiv", "")


def test_what_cannot_be_compared_is_refused(tmp_path, scores):
    a = evaluated(tmp_path / "a", {})
    b = evaluated(tmp_path / "b", {}, label="2")
    c = evaluated(tmp_path / "c", {})
    renamed = (c / "cases.csv").read_text(encoding="utf-8").replace("\ncase", "\nscan")
    (c / "cases.csv").write_text(renamed, encoding="utf-8")
    with pytest.raises(CompareError, match="Expected two or more evaluated folders, but got 1"):
        compare_folders([a], tmp_path / "out")
    with pytest.raises(
        CompareError, match=r"Expected the same labels in `.*a` and `.*b`, but got 1 and 2: evaluate both"
    ):
        compare_folders([a, b], tmp_path / "out")
    with pytest.raises(CompareError, match=r"Expected cases in common, but got none in `.*a` and `.*c`"):
        compare_folders([a, c], tmp_path / "out")
    with pytest.raises(CompareError, match=r"but got no readable cases\.csv: evaluate first\."):
        compare_folders([a, tmp_path], tmp_path / "out")
    with pytest.raises(CompareError, match=r"to name scores among iou, dice, .* but got speed: choose among these; "):
        compare_folders([a, a], tmp_path / "out", ["speed"])
