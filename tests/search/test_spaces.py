from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metapeft.errors import UserError
from metapeft.peft import METHODS, config_class
from metapeft.search import spaces
from metapeft.search.spaces import Choices, Range, Space
from metapeft.training.configuration import TrainConfig, full, split

optuna.logging.set_verbosity(optuna.logging.WARNING)


def sample(space: Space, count: int, seed: int = 0) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [spaces.suggest(study.ask(), space) for _ in range(count)]


@pytest.mark.parametrize("method", METHODS)
def test_every_name_is_a_field_of_the_method_or_the_trainer(method: str) -> None:
    known = config_class(method).names() | {f.name for f in fields(TrainConfig)}
    assert set(spaces.space().methods[method]) <= known


def said(domain: Range | Choices | None) -> str:
    """A domain as docs/hyperparameters.md has it."""
    if domain is None:
        return ""
    if isinstance(domain, Range):
        return f"{domain.low:g} to {domain.high:g}" + (", log" if domain.log else "")
    names = {(): "all", spaces.ATTENTION: "q, k, v, o_proj", ("q_proj", "v_proj"): "q, v_proj"}
    values = [names[v] if isinstance(v, tuple) else v if isinstance(v, str) else f"{v:g}" for v in domain.values]
    return ("; " if () in domain.values else ", ").join(values)


def test_the_page_has_every_hyperparameter_with_its_default_and_what_is_searched() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "hyperparameters.md").read_text(encoding="utf-8")
    sections = {part.partition("\n")[0]: part for part in page.split("\n## ")[1:]}
    rows = {
        title: {cells[1].strip("` "): (cells[2].strip(), cells[3].strip()) for cells in map(divide, part.splitlines())}
        for title, part in sections.items()
    }
    titles = {"lora": "LoRA", "adalora": "AdaLoRA", "prompt": "Prompt tuning", "prefix": "Prefix tuning"}
    trainer = {f.name for f in fields(TrainConfig)}
    for method in METHODS:
        found = rows["Training"] | rows[titles.get(method, "P-tuning")]
        defaults, searched = spaces.defaults(method), spaces.space([method]).methods[method]
        assert set(defaults) - {"method"} <= set(found)
        assert set(rows[titles.get(method, "P-tuning")]) - {"name", "---"} <= set(defaults) - trainer | {
            "learning_rate"
        }
        for name, value in defaults.items():
            if name != "method":
                plain = value if isinstance(value, str) else {"[]": "all"}.get(json.dumps(value), json.dumps(value))
                plain = f"{value:g}" if isinstance(value, float) else plain
                assert found[name] == (plain, said(searched.get(name))), (method, name)


def divide(line: str) -> list[str]:
    """The cells of a row of a table; three without text for any other line."""
    return line.split("|") if line.startswith("|") else ["", "---", "", ""]


@pytest.mark.parametrize("method", METHODS)
def test_issue_list_is_searched(method: str) -> None:
    wanted = {
        "lora": {"rank", "alpha", "dropout", "targets", "layers"},
        "adalora": {"initial_rank", "target_rank", "alpha", "targets", "layers", "initial_fraction", "final_fraction"},
        "prompt": {"tokens", "initialisation"},
        "prefix": {"tokens", "initialisation", "projection"},
        "p_tuning": {"tokens", "encoder", "width"},
    }
    assert wanted[method] | {"learning_rate", "batch_size", "warmup"} <= set(spaces.space().methods[method])


@pytest.mark.parametrize("method", METHODS)
def test_default_lies_inside_the_declared_space(method: str) -> None:
    default = spaces.defaults(method)
    assert spaces.project(default, spaces.space()) == default


def test_suggestions_are_valid_and_cover_every_method_and_choice() -> None:
    space = spaces.space()
    found = sample(space, 600)
    for configuration in found:
        split(configuration)  # raises on anything that the trainer would refuse
        assert set(configuration) == {"method", *space.methods[configuration["method"]]}
    for method, domains in space.methods.items():
        own = [c for c in found if c["method"] == method]
        assert len(own) > 60
        for name, domain in domains.items():
            values = [tuple(c[name]) if isinstance(c[name], list) else c[name] for c in own]
            if isinstance(domain, Choices):
                assert set(values) == set(domain.values), name
            else:
                assert domain.low <= min(values) and max(values) <= domain.high
                middle = (domain.low * domain.high) ** 0.5 if domain.log else (domain.low + domain.high) / 2
                assert 0.2 < sum(v < middle for v in values) / len(values) < 0.8, "the scale is searched evenly"


def test_rules_between_hyperparameters() -> None:
    for configuration in sample(spaces.space(["prefix", "adalora"], {"initial_rank": [2, 12]}), 200):
        if configuration["method"] == "prefix" and configuration["projection"]:
            assert configuration["initialisation"] == "random"
        if configuration["method"] == "adalora":
            assert configuration["target_rank"] <= configuration["initial_rank"]


@given(seed=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_project_and_encode_reproduce_any_suggestion(seed: int) -> None:
    space = spaces.space()
    (configuration,) = sample(space, 1, seed)
    assert spaces.project(configuration, space) == configuration
    assert spaces.project(full(configuration), space) == full(configuration), "names that are not searched are kept"
    study = optuna.create_study()
    study.enqueue_trial(spaces.encode(configuration, space))
    assert spaces.suggest(study.ask(), space) == configuration


@given(
    rate=st.floats(1e-6, 1.0),
    rank=st.integers(1, 300),
    targets=st.sampled_from([[], ["q_proj"], list(spaces.ATTENTION)]),
)
@settings(max_examples=60, deadline=None)
def test_project_lands_inside_and_stays_there(rate: float, rank: int, targets: list[str]) -> None:
    space = spaces.space(["lora"], {"rank": [2, 16], "learning_rate": {"low": 1.234e-4, "high": 1e-3}})
    inside = spaces.project({"method": "lora", "learning_rate": rate, "rank": rank, "targets": targets}, space)
    assert inside is not None
    assert 1.234e-4 <= inside["learning_rate"] <= 1e-3
    assert inside["rank"] == (2 if rank <= 9 else 16)
    assert spaces.project(inside, space) == inside
    study = optuna.create_study()
    study.enqueue_trial(spaces.encode(inside, space))
    assert spaces.suggest(study.ask(), space) == inside
    assert spaces.project({"method": "prompt"}, space) is None


def test_narrowing() -> None:
    space = spaces.space(
        ["lora", "prompt"],
        {
            "learning_rate": "1e-3",  # what YAML makes of 1e-3
            "lora.rank": [16, 4],
            "targets": ["q_proj", "v_proj"],
            "layers": [0, 4],
            "tokens": {"low": 3, "high": 6},
            "schedule": ["cosine", "linear"],
            "steps": [20, 40],
            "dropout": {"low": 0.05, "high": 0.1},
            "p_tuning.width": 64,  # a method that is not searched
        },
    )
    lora, prompt = space.methods["lora"], space.methods["prompt"]
    assert list(space.methods) == ["lora", "prompt"]
    assert lora["learning_rate"] == prompt["learning_rate"] == Choices((0.001,), ordered=True)
    assert lora["rank"] == Choices((4, 16), ordered=True) and "rank" not in prompt
    assert lora["targets"] == Choices((("q_proj", "v_proj"),))
    assert lora["layers"] == Choices((4, 0), ordered=True), "0 means all, so it comes last"
    assert prompt["tokens"] == Range(3, 6, log=True, integer=True)
    assert lora["schedule"] == prompt["schedule"] == Choices(("cosine", "linear"))
    assert lora["steps"] == Choices((20, 40), ordered=True)
    assert lora["dropout"] == Range(0.05, 0.1)
    for configuration in sample(space, 50):
        assert configuration["steps"] in (20, 40)
        configuration.pop("steps")
        split(configuration)


def test_range_keeps_the_declared_scale() -> None:
    narrowed = spaces.space(["lora"], {"learning_rate": {"low": 1e-4, "high": 1e-3}}).methods["lora"]["learning_rate"]
    assert narrowed == Range(1e-4, 1e-3, log=True)


def test_method_is_searched_among_those_named() -> None:
    assert list(spaces.space(narrow={"method": ["prefix", "lora"]}).methods) == ["lora", "prefix"]
    assert list(spaces.space(narrow={"method": "prompt"}).methods) == ["prompt"]
    assert [c["method"] for c in sample(spaces.space(["prompt"]), 3)] == ["prompt"] * 3


def test_a_backbone_leaves_out_what_it_does_not_have() -> None:
    lora = spaces.space(["lora"], depth=12, modules={"qkv_proj", "o_proj"}).methods["lora"]
    assert lora["layers"] == Choices((2, 4, 8, 0), ordered=True)
    assert lora["targets"] == Choices(((),))
    assert spaces.space(["lora"], depth=1).methods["lora"]["layers"] == Choices((0,), ordered=True)


def test_the_portfolio_lies_inside_the_space_that_it_warms() -> None:
    from metapeft.meta.portfolio import portfolio

    for depth in (24, 30):
        space = spaces.space(depth=depth)
        for configuration in portfolio(depth):
            inside = spaces.project(configuration, space)
            assert inside is not None and inside | configuration == inside


@pytest.mark.parametrize(
    ("narrow", "message"),
    [
        ({"rnak": 4}, "space.rnak is no hyperparameter"),
        ({"lora.tokens": 4}, "space.lora.tokens is no hyperparameter"),
        ({"nora.rank": 4}, "space.nora.rank is no hyperparameter"),
        ({"rank": []}, "the list of choices is empty"),
        ({"rank": "many"}, "space.rank: "),
        ({"rank": 0}, "at least 1"),
        ({"dropout": [0.1, 1.5]}, r"\[0, 1\)"),
        ({"learning_rate": {"low": 1e-3, "high": 1e-4}}, "low=0.001 must not exceed high=0.0001"),
        ({"learning_rate": {"low": 0, "high": 1e-4}}, "above 0"),
        ({"learning_rate": {"from": 0, "to": 1}}, "a range is"),
        ({"learning_rate": float("inf")}, "finite"),
        ({"initialisation": {"low": "a", "high": "b"}}, "space.initialisation"),
        ({"initialisation": "zeros"}, "space.initialisation"),
        ({"steps": 0}, "at least 1"),
        ({"method": "nora"}, "unknown method 'nora'"),
    ],
)
def test_wrong_narrowing_is_named(narrow: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        spaces.space(None, narrow)


def test_a_name_that_no_searched_method_has_is_a_mistake() -> None:
    with pytest.raises(UserError, match=r"space.rank is no hyperparameter of prefix; lora has it"):
        spaces.space(["prefix"], {"rank": [4, 8]})
    with pytest.raises(UserError, match=r"of lora or adalora; prompt and prefix and p_tuning have it"):
        spaces.space(["lora", "adalora"], {"tokens": 8})
    assert "rank" not in spaces.space(["lora", "prefix"], {"rank": [4, 8]}).methods["prefix"]


def test_methods_that_exclude_each_other() -> None:
    with pytest.raises(UserError, match="leaves nothing to search"):
        spaces.space(["lora"], {"method": "prompt"})
    with pytest.raises(UserError, match="unknown method"):
        spaces.space(["qlora"])
    with pytest.raises(UserError, match="unknown method"):
        spaces.defaults("qlora")


def test_a_space_file_is_yaml_or_json(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        "method: [lora, prompt]\nlearning_rate: 1e-3\nlora:\n  rank: [4, 8]\nprompt.tokens: {low: 4, high: 8}\n"
    )
    given = spaces.read(path)
    assert given == {
        "method": ["lora", "prompt"],
        "learning_rate": "1e-3",
        "lora.rank": [4, 8],
        "prompt.tokens": {"low": 4, "high": 8},
    }
    narrowed = spaces.space(narrow=given)
    assert set(narrowed.methods) == {"lora", "prompt"}
    assert narrowed.methods["lora"]["rank"] == spaces.Choices((4, 8), ordered=True)
    assert narrowed.methods["prompt"]["learning_rate"] == spaces.Choices((1e-3,), ordered=True)
    (tmp_path / "space.json").write_text(json.dumps(given))
    assert spaces.read(tmp_path / "space.json") == given
    (tmp_path / "space.json").write_text('{\n\t"rank": [4, 8]\n}')
    assert spaces.read(tmp_path / "space.json") == {"rank": [4, 8]}
    path.write_text("")
    assert spaces.read(path) == {}


def test_a_section_of_a_method_goes_before_what_is_said_of_all() -> None:
    for narrow in (
        {"lora": {"learning_rate": 1e-3}, "learning_rate": [1e-2, 1e-1]},
        {"learning_rate": [1e-2, 1e-1], "lora.learning_rate": 1e-3},
    ):
        found = spaces.space(["lora", "prompt"], narrow).methods
        assert found["lora"]["learning_rate"] == spaces.Choices((1e-3,), ordered=True)
        assert found["prompt"]["learning_rate"] == spaces.Choices((1e-2, 1e-1), ordered=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the space file"),
        ("[1, 2]", "must map"),
        ("a: [", "not valid YAML"),
        ("1: 2", "must map"),
    ],
)
def test_a_wrong_space_file_is_one_clear_sentence(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "space.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        spaces.read(path)
