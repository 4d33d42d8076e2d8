from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser, config_parser

from monai_iou.files import FORMULA_STARTS, csv_text, json_text, read_csv, write_csv, write_json, write_text

HOSTILE = [
    "=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "'=1",
    "''=1", "'", "'a", "a\rb", "a\r\nb",    'a"b', "a,b", " a ", "", "-", "a\0b", "\uff1d1", "x" * 200_000, "über/ñ",
    "x;=1+1", "x;'=1", "x;;-1", ";=1", "\t\t=1", "x\t@a;\uff0b1", "x\n=1", 'x";=1', "a;b",
    'x;"=1+1;y', 'x\t"=1\ty', "x;'\"=1", "x;\"'=1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def long_cells() -> Iterator[None]:
    """Let the `csv` module of these tests read the longest text of `HOSTILE`."""
    limit = csv.field_size_limit(1 << 20)
    yield
    csv.field_size_limit(limit)


@pytest.mark.parametrize("text", HOSTILE)
def test_text_reads_back_and_runs_as_no_formula(tmp_path, text):
    write_csv(tmp_path / "t.csv", ("case", "iou"), [{"case": text, "iou": 0.5}, {"case": "next", "iou": 1.0}])
    assert read_csv(tmp_path / "t.csv") == [{"case": text, "iou": "0.5"}, {"case": "next", "iou": "1.0"}]
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as stream:
        cell = list(csv.reader(stream))[1][0]
    assert not cell.startswith(FORMULA_STARTS)


@given(st.lists(st.lists(st.text(st.characters(exclude_categories=("Cs",))), min_size=2, max_size=2), max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_table_reads_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("table") / "t.csv"
    content = [dict(zip("ab", row, strict=True)) for row in rows if any(row)]
    write_csv(path, "ab", content)
    assert read_csv(path) == [{name: str(value) for name, value in row.items()} for row in content]


def test_numbers_keep_every_bit_and_are_never_quoted_or_marked(tmp_path):
    values = [0.1 + 0.2, -1.0, 1e300, -math.inf, 5e-324, 7]
    write_csv(tmp_path / "t.csv", ("x", "y"), [{"x": value, "y": math.nan} for value in values])
    assert [float(row["x"]) for row in read_csv(tmp_path / "t.csv")] == values
    assert {row["y"] for row in read_csv(tmp_path / "t.csv")} == {""}
    assert "'" not in (tmp_path / "t.csv").read_text(encoding="utf-8")
    # Label values are text in cases.csv, and may be negative.
    assert csv_text([["-1", "+2", "-1+1"]]) == "-1,+2,'-1+1\n"


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_is_read_by_the_separator_of_its_header(tmp_path, separator, encoding):
    cells = [["case", " patient "], ["a,b;c\td", "P\n1"], ["", "\u00fc"]]
    (tmp_path / "t.csv").write_text(csv_text(cells, separator), encoding=encoding, newline="")
    assert read_csv(tmp_path / "t.csv") == [{"case": a, "patient": b} for a, b in cells[1:]]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("separator", [";", "\t"])
@pytest.mark.parametrize("place", [0, 1])
def test_text_runs_as_no_formula_in_a_spreadsheet_with_another_separator(text, separator, place):
    """Such a spreadsheet sees no quotes but at the start of its cells: not those of text after a comma."""
    row = [text, "b"] if place == 0 else ["a", text]
    lines = csv_text([row]).splitlines()
    cells = [cell for line in csv.reader(lines, delimiter=separator) for cell in line]
    assert not any(cell.startswith(FORMULA_STARTS) for cell in cells)
    assert place or text not in ("x;=1+1", "a;b") or len(cells) == 1


def test_other_separators_quote_their_own(tmp_path):
    assert csv_text([["a;b", "c,d"]], ";") == '"a;b";c,d\n'


def test_names_that_are_not_utf8_are_written_as_escapes(tmp_path):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    write_text(tmp_path / "t.txt", name)
    assert (tmp_path / "t.txt").read_text(encoding="utf-8") == "caf\\udce9"
    write_json(tmp_path / "t.json", {"case": name})
    assert json.loads((tmp_path / "t.json").read_text(encoding="utf-8")) == {"case": name}


def test_json_is_strict(tmp_path):
    write_json(tmp_path / "t.json", {"a": [math.nan, math.inf, -math.inf, 1.5]})

    def refuse(text: str) -> None:
        raise AssertionError(text)

    found = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert found == {"a": [None, None, None, 1.5]}


NAMES = ["C:\\Users\\\u00c1ngel", "J\u00fcrgen", "n\u00e1dor \u010d. 1", "\u809d\u81d3", "\U0001fac0"]


@pytest.mark.parametrize("encoding", ["cp1252", "cp932", "latin-1", "ascii", "utf-8"])
@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_read_alike_in_the_encoding_of_every_system(tmp_path, monkeypatch, encoding, name):
    content = {"dataset_dir": name, "plan_report": {name: [name, 1.5]}}
    write_json(tmp_path / "plan.json", content)

    def open_there(file, *rest, **named):
        return open(file, *rest, **{"encoding": encoding, **named})  # noqa: PTH123 - as MONAI does

    monkeypatch.setattr(config_parser, "open", open_there, raising=False)
    assert ConfigParser.load_config_file(str(tmp_path / "plan.json")) == content
    assert name.replace("\\", "\\\\") in json_text(content), "what people read has the letters themselves"


def test_what_is_no_table_is_refused(tmp_path: Path):
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="codec"):
        read_csv(tmp_path / "t.csv")
    with pytest.raises(OSError, match="No such file"):
        read_csv(tmp_path / "absent.csv")
