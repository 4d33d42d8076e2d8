"""Checks of the documents that need more than the tests' environment: `python docs/check.py`.

Every dependency has its reason in docs/dependencies.md and its tested version in constraints.txt, which the oldest
supported Python can install; every public name stands in some page; the plots are drawn again by their script, and each
picture of a page is among them.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import monai_iou

if sys.version_info >= (3, 11):
    import tomllib
else:  # the checks run on the newest Python; an older one reads the same file by the package that became tomllib
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
OLDEST_PYTHON = {"python_version": "3.10", "python_full_version": "3.10.99"}


def _requirement_name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def dependency_problems() -> list[str]:
    """Name dependencies without a reason or without a tested version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {_requirement_name(item) for group in groups for item in group} - {"monai-iou"}
    reasons = {
        _requirement_name(cell)
        for row in re.findall(r"^\| ([^|]+)\|", (DOCS / "dependencies.md").read_text(), re.MULTILINE)
        for cell in row.replace("`", "").split(", ")
        if cell.strip()
    }
    pins = {_requirement_name(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    missing = [f"docs/dependencies.md gives no reason for {name}" for name in sorted(names - reasons)]
    return missing + [f"constraints.txt pins no version of {name}" for name in sorted(names - pins)]


def pin_problems() -> list[str]:
    """Name versions in constraints.txt that the oldest Python has none of and that are pinned for it nevertheless."""
    problems = []
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if "==" not in line or line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is not None and not pin.marker.evaluate(OLDEST_PYTHON):
            continue
        try:
            wanted = importlib.metadata.metadata(pin.name)["Requires-Python"]
        except importlib.metadata.PackageNotFoundError:  # it is for another machine
            continue
        if wanted and not SpecifierSet(wanted).contains(OLDEST_PYTHON["python_full_version"]):
            problems.append(f"constraints.txt pins {pin.name} for every Python, but it needs {wanted}")
    return problems


def undocumented_names() -> list[str]:
    """Name public names that no page mentions."""
    text = "\n".join(page.read_text() for page in [ROOT / "README.md", *DOCS.glob("**/*.md")])
    public = [name for name in monai_iou.__all__ if not name.startswith("__")]
    return [f"no page of docs/ mentions {name}" for name in public if not re.search(rf"\b{name}\b", text)]


def plot_problems() -> list[str]:
    """Draw the plots again and name pictures of pages that the script does not make."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, DOCS / "plots.py", "--output", folder], check=True)
        drawn = {path.name for path in Path(folder).iterdir()}
    shown = {
        Path(target)
        for page in DOCS.glob("*.md")
        for target in re.findall(r"!\[[^]]*\]\((images/[^)]+)\)", page.read_text())
    }
    lost = [f"docs/{path} is shown but not there" for path in sorted(shown) if not (DOCS / path).exists()]
    return lost + [f"docs/plots.py does not draw {path}" for path in sorted(shown) if path.name not in drawn]


def main() -> int:
    """Print every problem and return 1 if there is one."""
    problems = [*dependency_problems(), *pin_problems(), *undocumented_names(), *plot_problems()]
    for problem in problems:
        sys.stderr.write(problem + "\n")
    sys.stdout.write(f"documents: {len(problems)} problems\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
