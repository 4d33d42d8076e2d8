"""Promises of the package as a whole: what is public, what importing costs, how MONAI finds it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser
from monai.bundle.config_item import ComponentLocator
from places import ROOT

import monai_iou

# Imported inside functions only: they cost time, or are needed by one command.
HEAVY = ("nibabel", "SimpleITK", "ignite", "scipy", "cc3d", "matplotlib", "dask", "distributed", "rich", "jinja2")

# What lies directly in the package; everything else belongs to one of its folders.
TOP_FILES = {
    "__init__.py",
    "bundle_files.py",
    "checks.py",
    "cli.py",
    "components.py",
    "console.py",
    "demo.py",
    "distributed.py",
    "files.py",
    "handlers.py",
    "locks.py",
    "networks.py",
    "scores.py",
    "spacing.py",
    "streams.py",
    "tables.py",
    "versions.py",
    "weighting.py",
}


def _modules_of(first: str, second: str) -> tuple[set[str], list[str]]:
    """Return the top names of the modules that the second statements add to those of the first, and what is printed."""
    code = f"import sys, json\n{first}\nbefore = set(sys.modules)\n{second}\n"
    code += "print(json.dumps(sorted(set(sys.modules) - before)))"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    *printed, modules = result.stdout.splitlines()
    return {name.split(".")[0] for name in json.loads(modules)}, printed


BY_A_FULL_NAME = """
from monai.bundle import ConfigParser
parser = ConfigParser({'loss': {'_target_': 'monai_iou.IoULoss'}})
assert 'monai_iou' not in sys.modules
print(type(parser.get_parsed_content('loss')).__module__)
import monai_iou
"""


@pytest.fixture(scope="module")
def beside_monai() -> tuple[set[str], list[str]]:
    """What the package adds to MONAI, and the module of a loss that a config names: imported once, as that is slow."""
    return _modules_of("import monai, monai.handlers", BY_A_FULL_NAME)


def test_no_file_lies_outside_the_folders() -> None:
    assert {path.name for path in Path(monai_iou.__file__).parent.glob("*.py")} <= TOP_FILES


def test_public_names_are_sorted_and_exist() -> None:
    names = monai_iou.__all__
    assert names == sorted(names)
    assert all(hasattr(monai_iou, name) for name in names)


def test_changelog_has_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## {re.escape(monai_iou.__version__)}", changelog, re.MULTILINE)


def test_import_adds_nothing_heavy_to_monai(beside_monai: tuple[set[str], list[str]]) -> None:
    added, _ = beside_monai
    assert "monai_iou" in added
    assert not added & set(HEAVY)


def test_the_check_of_light_imports_can_fail() -> None:
    assert "scipy" in _modules_of("import json", "import scipy")[0]


@pytest.mark.parametrize("prefix", ["", "monai_iou."])
def test_short_and_full_names_in_a_config(prefix: str) -> None:
    config = {
        "imports": ["$import monai_iou"],
        "loss": {"_target_": f"{prefix}IoULoss", "softmax": True},
    }
    loss = ConfigParser(config).get_parsed_content("loss")
    assert isinstance(loss, monai_iou.IoULoss)
    assert loss.softmax


def test_no_public_name_is_monais() -> None:
    table = ComponentLocator(excludes=["monai_iou"])
    taken = [name for name in monai_iou.__all__ if table.get_component_module_name(name) is not None]
    # MONAI's, a registration loss at several Gaussian scales, wins the short name; ours takes its full path in configs.
    assert taken == ["MultiScaleLoss"]


def test_full_name_needs_no_import(beside_monai: tuple[set[str], list[str]]) -> None:
    assert beside_monai[1][-1].startswith("monai_iou.")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, monai_iou_command\n"
        "status = monai_iou_command.main(['--help'])\n"
        "assert status == 0\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.startswith("Usage: monai-iou")
    imported = set(result.stdout.splitlines()[-1].split())
    # Without these the help takes a fifth of a second; each of them would take it past the second that is promised.
    assert not imported & {"monai", "monai_iou", "numpy", "torch", *HEAVY}


def test_the_metadata_names_the_licence_of_the_weights_too() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    expression, files = (re.search(rf"^{name} = (.+)$", text, re.MULTILINE) for name in ("license", "license-files"))
    page = ROOT / "bundles" / "hippocampus_mr" / "README.md"
    of_weights = re.search(r"\*\*Licence of the weights\*\*: (.+?) \(", page.read_text(encoding="utf-8"))
    assert of_weights is not None
    assert expression is not None
    assert json.loads(expression[1]).split(" AND ") == ["Apache-2.0", of_weights[1].replace(" ", "-")]
    assert files is not None
    assert {ROOT / name for name in json.loads(files[1])} == {ROOT / "LICENSE", page}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the files that git tracks")
def test_a_wheel_holds_the_bundles_files_that_git_tracks_and_no_others(tmp_path: Path) -> None:
    """Hatch takes forced files and whole forced folders without asking .gitignore."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    listed = subprocess.run(["git", "ls-files", "-z", "bundles"], cwd=ROOT, check=True, capture_output=True, text=True)
    tracked = listed.stdout.rstrip("\0").split("\0")
    left = ["eval/pictures/case.png", "models/last_epoch.pt", "predictions/case.nii.gz", "log.txt"]
    bundle = "bundles/small_foreground_segmentation"
    for name in [*tracked, *(f"{bundle}/{name}" for name in left), "bundles/hippocampus_mr/models/.monai_iou.lock"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = settings["tool"]["hatch"]["build"]["targets"]["wheel"]
    held = {}
    for source, target in wheel["force-include"].items():
        path = tmp_path / source
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        held.update({str(target + file.as_posix().removeprefix(path.as_posix())): file for file in files})
    del held["monai_iou_command.py"]
    assert sorted(held) == sorted(f"monai_iou/{name}" for name in tracked)
    assert all(file == tmp_path / name.removeprefix("monai_iou/") and file.is_file() for name, file in held.items())


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    from monai_iou.cli import main

    assert main(["no-such-command"]) == 2
    assert "Expected a command, but got" in capsys.readouterr().err


def test_metatensor_gives_a_plain_tensor() -> None:
    from monai.data import MetaTensor

    logits = MetaTensor(torch.randn(1, 2, 4, 4), affine=torch.eye(4))
    labels = MetaTensor(torch.ones(1, 1, 4, 4), affine=torch.eye(4))
    assert type(monai_iou.IoULoss(softmax=True)(logits, labels)) is torch.Tensor
