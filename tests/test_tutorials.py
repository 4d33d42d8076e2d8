"""The tutorials of docs/tutorials run from the first cell to the last, and their page names all of them."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from places import ROOT

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))


def test_the_page_names_every_tutorial() -> None:
    page = (ROOT / "docs" / "tutorials.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((tutorials/\w+\.py)\)", page)) == {f"tutorials/{path.name}" for path in TUTORIALS}
    assert len(TUTORIALS) == 5


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_cells_of_prose_and_code(tutorial: Path) -> None:
    cells = re.split(r"^# %%", tutorial.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert cells[0] == ""
    prose = [cell for cell in cells if cell.startswith(" [markdown]\n")]
    assert prose[0].splitlines()[1].startswith("# # ")
    assert len(prose) >= 4
    assert all(line.startswith("#") or not line for cell in prose for line in cell.splitlines()[1:])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(tutorial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    runpy.run_path(str(tutorial), run_name="__main__")
    (folder,) = tmp_path.glob(f"{tutorial.stem}_*")  # libraries may keep something of their own beside it
    assert any(folder.iterdir())
