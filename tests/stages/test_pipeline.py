"""`dvc.yaml`, the stage modules and `params.yaml` say the same."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

from metapeft import stages
from metapeft.settings import Settings, load_settings
from metapeft.stages.stage import content, dotted

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pipeline() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def test_the_same_stages_in_the_same_order(pipeline: dict[str, Any]) -> None:
    assert tuple(pipeline) == stages.NAMES


@pytest.mark.parametrize("name", stages.NAMES)
def test_dvc_knows_what_a_stage_reads(pipeline: dict[str, Any], name: str) -> None:
    stage, declared = stages.get(name), pipeline[name]
    own = {"data"} if name == "version" else set()
    assert set(declared["deps"]) == own | set(stage.code) | {
        f"artifacts/{need}" for need in (*stage.needs, *stage.uses)
    }
    assert set(declared.get("params", ())) == set(stage.settings)
    assert declared["outs"] == [f"artifacts/{name}"]
    assert declared["cmd"] == f"${{python}}.{name}"


@pytest.mark.parametrize("name", stages.NAMES)
def test_a_stage_reads_only_earlier_stages_code_that_exists_and_settings_that_exist(name: str) -> None:
    stage = stages.get(name)
    earlier = stages.NAMES[: stages.NAMES.index(name)]
    assert {need.partition("/")[0] for need in (*stage.needs, *stage.uses)} <= set(earlier)
    assert all(content(ROOT / path) for path in stage.code), stage.code
    values = Settings().model_dump()
    for setting in stage.settings:
        dotted(values, setting)


# What decides no output, and the records that all stages hand on.
PLUMBING = {f"metapeft.{name}" for name in ("errors", "files", "progress", "settings", "runtime")}
PLUMBING |= {"metapeft", "metapeft.stages.stage", "metapeft.stages.tracked"}
PLUMBING |= {"metapeft.data.task", "metapeft.training.trial"}
TRAINER = "metapeft/stages/trainer.py"  # what it needs for exchanging methods, the final training alone needs


def imported(path: Path) -> set[str]:
    """Modules of ours that a file names, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("metapeft"):
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                place = ROOT / name.replace(".", "/")
                found.add(name if place.is_dir() or place.with_suffix(".py").exists() else str(node.module))
    return found


@pytest.mark.parametrize("name", stages.NAMES)
def test_a_stage_is_stale_when_the_code_that_it_uses_has_changed(name: str) -> None:
    code = stages.get(name).code
    own = [path for path in code if path.startswith("metapeft/stages/") and (name == "train" or path != TRAINER)]
    used = set().union(*(imported(ROOT / path) for path in own)) - PLUMBING
    places = {module: module.replace(".", "/") for module in used}
    missing = {m for m, p in places.items() if not any(c in (p, f"{p}.py") or p.startswith(f"{c}/") for c in code)}
    assert not missing


def test_params_name_every_setting() -> None:
    """DVC can only watch a parameter that is written down."""
    assert load_settings(ROOT / "params.yaml")
    written = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert keys(written) == keys(Settings().model_dump())


SECTIONS = {name for name, value in Settings() if hasattr(value, "model_fields")}


def keys(values: dict[str, Any]) -> set[str]:
    found: set[str] = set()
    for name, value in values.items():
        inner = {f"{name}.{key}" for key in value} if isinstance(value, dict) and name in SECTIONS else set()
        found |= inner or {name}
    return found
