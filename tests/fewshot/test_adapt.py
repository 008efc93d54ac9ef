"""Adapting end to end on a tiny backbone: what it leaves, says, and takes over from other tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import metapeft
from metapeft import cli
from metapeft.data import shots
from metapeft.errors import MetapeftError, UserError
from metapeft.fewshot import STRATEGIES, reptile, tried
from metapeft.fewshot.adapt import adapt, explained, starts_of
from metapeft.fewshot.choose import Held, Prior, Strategy, choose
from metapeft.fewshot.measure import Answers
from metapeft.fewshot.optimism import Optimism
from metapeft.fewshot.strategies import Nearest, cold, strategies
from metapeft.meta import library
from metapeft.peft import adapters, checkpoints
from metapeft.profiling import profile
from metapeft.settings import DataSettings
from metapeft.training.evaluation import evaluate
from metapeft.training.session import Session
from metapeft.training.trainer import run_trial
from tests.backbones.tiny import tiny, tiny_folder
from tests.stages.made import spam_file
from tests.training import made

TASK = replace(made.classification(train=60, longest=8), family="made", name="mine")
LIKED = {"cold prefix": Prior(0.9, 0.01)}


@pytest.fixture(scope="module")
def backbone() -> metapeft.backbones.Backbone:  # type: ignore[name-defined]
    return tiny("llama")


def taught(name: str, backbone: object, tmp: Path, seed: int) -> None:
    """An adapter of each method in the library, of another task."""
    task = replace(made.classification(longest=8, seed=seed), name=name, family=f"{name}s", licence="MIT")
    session = Session(backbone, task)  # type: ignore[arg-type]
    for configuration in cold(session.depth).values():
        folder = tmp / f"{name}-{configuration['method']}"
        trial = run_trial(session, configuration, steps=4, folder=folder, test=False)
        assert library.offer(folder, trial, task, profile(task, backbone))  # type: ignore[arg-type]


def test_an_ordinary_adapter_is_left(backbone: object) -> None:
    few = shots.draw(TASK, 6, 0)
    said: list[str] = []
    found = adapt(
        few,
        backbone,
        only=["cold prefix"],
        priors=LIKED,
        report=lambda what, done, of: said.append(what),  # type: ignore[arg-type]
    )
    assert found.chosen and found.chosen.strategy == "cold prefix" and found.shots == 6 and "cold prefix" in said
    assert found.trial and found.score and found.untuned_score and found.score.n == len(TASK.test)
    assert "cold prefix" in found.why and "held-out" in found.why and found.seconds > 0
    saved = checkpoints.read(Path(found.adapter))
    assert saved.metadata["few_shots"]["strategy"] == "cold prefix" and saved.metadata["task"]["name"] == "mine"
    session = Session(backbone, few)  # type: ignore[arg-type]
    adapter = adapters.load(Path(found.adapter), session.model)
    adapter.attach(session.model)
    again = evaluate(session, adapter, "test")
    adapter.detach(session.model)
    assert again.value == found.score.value and again.loss == pytest.approx(found.score.loss, rel=1e-4)
    same = adapt(few, backbone, only=["cold prefix"], priors=LIKED)  # type: ignore[arg-type]
    assert same.adapter == found.adapter, "the same work, the same id"
    json.dumps(found.to_json())


def test_what_choosing_adds_is_no_gain(backbone: object, monkeypatch: pytest.MonkeyPatch) -> None:
    few, open_mind = shots.draw(TASK, 6, 0), {"cold prefix": Prior(0.9, 1e3)}
    believed = adapt(few, backbone, only=["cold prefix"], priors=open_mind)  # type: ignore[arg-type]
    monkeypatch.setattr("metapeft.fewshot.adapt.optimism", lambda *_: Optimism(0.0, 0.25))
    doubted = adapt(few, backbone, only=["cold prefix"], priors=open_mind)  # type: ignore[arg-type]
    assert doubted.judged[0].gain < believed.judged[0].gain - 0.2


def test_one_shot_is_decided_by_the_prior(backbone: object) -> None:
    few = shots.draw(TASK, 1, 0)
    found = adapt(few, backbone, priors={"context": Prior(0.2, 0.1)})  # type: ignore[arg-type]
    assert found.chosen and found.chosen.strategy == "context" and found.chosen.gain == pytest.approx(0.2)
    assert TASK.train and few.train[0].prompt in found.prompt and found.chosen.standard_error == 0
    assert checkpoints.read(Path(found.adapter)).metadata["few_shots"]["prompt"] == found.prompt
    nothing = adapt(few, backbone, priors={"context": Prior(-0.2, 0.1)})  # type: ignore[arg-type]
    assert nothing.chosen is None and nothing.adapter == "" and nothing.trial is None
    assert nothing.score == nothing.untuned_score and "untuned" in nothing.why


def test_time_is_kept_and_what_was_left_out_is_said(backbone: object) -> None:
    found = adapt(shots.draw(TASK, 4, 0), backbone, max_seconds=0.0)  # type: ignore[arg-type]
    assert found.skipped == ("tuned context", "cold lora", "cold prefix") and not found.judged[0].measured
    assert [j.strategy for j in found.judged] == ["context"] and found.late


def test_what_nothing_better_is_expected_of_stays_untried(backbone: object) -> None:
    poor = {name: Prior(-0.5, 0.01) for name in STRATEGIES}
    found = adapt(shots.draw(TASK, 4, 0), backbone, priors=poor | {"context": Prior(0.5, 0.01)})  # type: ignore[arg-type]
    assert [j.strategy for j in found.judged] == ["context"] and found.judged[0].measured and not found.late
    assert found.skipped == ("tuned context", "cold lora", "cold prefix")
    asked = ["context", "cold lora"]
    found = adapt(shots.draw(TASK, 4, 0), backbone, only=asked, priors=poor)  # type: ignore[arg-type]
    assert sorted(j.strategy for j in found.judged) == sorted(asked) and found.skipped == ()


def test_what_other_tasks_have_taught_is_used(backbone: object, tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two"), 1):
        taught(name, backbone, tmp_path, number)
    few = shots.draw(TASK, 4, 0)
    session = Session(backbone, replace(few, validation=few.train))  # type: ignore[arg-type]
    near = library.find(profile(few, backbone), 4)  # type: ignore[arg-type]
    ways = {s.name: s for s in strategies(session, near, {})}
    open_ = ["context", "tuned context", "cold lora", "cold prefix", "nearest lora", "mix lora", "nearest prefix"]
    assert list(ways) == open_ and {*open_, "reptile lora", "reptile prefix"} == set(STRATEGIES)
    assert ways["nearest lora"].rival == "cold lora" and "one" in ways["mix lora"].origin
    pick = ways["nearest lora"].start
    assert isinstance(pick, Nearest) and pick.chosen().entry.trial.task in ("one", "two")
    found = adapt(few, backbone, only=["nearest lora", "cold lora"], priors={"nearest lora": Prior(0.9, 0.01)})  # type: ignore[arg-type]
    assert found.chosen and found.chosen.strategy == "nearest lora" and found.chosen.transfer
    assert found.trial and found.trial.method == "lora" and Path(found.adapter).is_dir()
    without = library.find(profile(few, backbone), 4, without={"ones", "two"})  # type: ignore[arg-type]
    named = [library.find(profile(few, backbone), 4, named=name) for name in ("one", "ones")]  # type: ignore[arg-type]
    assert {f.entry.trial.task for f in named[0]} == {"two"}
    assert {f.entry.trial.task for f in named[1]} == {"one", "two"}, "a file may be called like a family"
    assert without == []


def test_a_start_that_was_learned_on_the_task_does_not_count(backbone: object) -> None:
    other = replace(made.classification(seed=3), name="other", family="others")
    for method, configuration in cold(4).items():
        place = reptile.place(backbone, method)  # type: ignore[arg-type]
        reptile.reptile(backbone, [other], configuration, rounds=1, folder=place, inner=1)  # type: ignore[arg-type]
    assert starts_of(backbone).keys() == {"lora", "prefix"}  # type: ignore[arg-type]
    assert starts_of(backbone, {"mine"}).keys() == {"lora", "prefix"}  # type: ignore[arg-type]
    assert starts_of(backbone, {"others"}) == starts_of(backbone, {"other"}) == {}  # type: ignore[arg-type]
    assert starts_of(backbone, named="other") == {}  # type: ignore[arg-type]
    assert starts_of(backbone, named="others").keys() == {"lora", "prefix"}  # type: ignore[arg-type]
    assert library.entries() == [], "a start is no adapter of a task"


def test_from_a_file_of_shots(tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    rows = [{"prompt": f"{n} ->", "completion": f"{n + 1}"} for n in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(tiny_folder("llama"))
    found = metapeft.adapt(path, backbone=model, strategies=["context"])
    assert list(tried.folder().glob("*")) == [], "nothing is left of one that ended"
    assert found.shots == 5 and found.task == "few" and found.score is None and found.untuned_score is None
    with pytest.raises(UserError, match="--shots"):
        metapeft.adapt("trec6", backbone=model)
    with pytest.raises(UserError, match="no start can be learned for prompt"):
        metapeft.api.learn_starts(methods=["prompt"], backbone=model)  # type: ignore[attr-defined]


def test_where_nothing_could_be_tried_it_says_so() -> None:
    said = explained(choose([], {}, Answers(np.zeros(2), np.zeros(2), np.ones(2)), {}))
    assert said == "Leave the backbone untuned: none of the strategies asked for is open on these shots."


def test_where_nothing_was_measured_the_prior_speaks_and_says_so() -> None:
    ways, untuned = [Strategy("context", context=True)], Answers(np.zeros(1), np.full(1, 0.4), np.ones(1))
    gains = explained(choose(ways, {}, untuned, {"context": Prior(0.2, 0.1)}))
    assert gains == (
        "Nothing was measured on held-out shots; what earlier tasks have shown says that context (without training)"
        " gains 0.200 ± 0.100 over the untuned backbone's 0.200, 97.7% sure that it gains."
    )
    loses = explained(choose(ways, {}, untuned, {"context": Prior(-0.2, 0.1)}))
    assert loses.startswith("Leave the backbone untuned: nothing was measured on held-out shots")


def test_a_gain_is_told_once() -> None:
    ways, untuned = [Strategy("context", context=True)], Answers(np.zeros(4), np.full(4, 0.2), np.ones(4))
    held = {"context": Held({0: Answers(np.ones(4), np.full(4, 0.8), np.ones(4))})}
    choice = choose(ways, held, untuned, {})
    said = explained(choice)
    assert choice.chosen and f"{choice.chosen.difference:+.3f}" in said and "held-out" in said
    assert "ahead of" not in said, "nothing else was judged: it is ahead by its gain"


def test_shots_drawn_from_a_part_of_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = tmp_path / "params.yaml"
    params.write_text("data: {max_train: 12, max_validation: 4, max_test: 6}\n")
    model = str(tiny_folder("llama"))
    words = [str(spam_file(tmp_path)), "--shots", "1", "--strategy", "context", "--backbone", model]
    assert cli.main(["adapt", *words, "--params", str(params)]) == 0
    told = capsys.readouterr()
    assert told.err.count("adapt: using 12 of 70 training rows (data.max_train)") == 1
    assert "+0.000" not in told.out and "held-out shots" in told.out and "using" not in told.out


def test_a_training_that_breaks_off_is_told(backbone: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(mb: float = 0.0) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr("metapeft.training.trainer.require_memory", short)
    with pytest.raises(MetapeftError, match="training cold prefix on the shots ended as"):
        adapt(shots.draw(TASK, 1, 0), backbone, only=["cold prefix"], priors=LIKED)  # type: ignore[arg-type]


def test_a_label_that_no_example_shows_can_still_be_an_answer(backbone: object, tmp_path: Path) -> None:
    rows = [{"text": f"row {i} {'abc'[i % 3]}", "label": f"common {i % 3}"} for i in range(60)]
    rows += [{"text": f"odd {i}", "label": f"rare {i}"} for i in range(5)]
    (tmp_path / "rare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few, _ = shots.load_shots(str(tmp_path / "rare.jsonl"), 4, DataSettings(), 0)
    found = adapt(few, backbone, only=["cold prefix"], priors=LIKED)  # type: ignore[arg-type]
    assert found.score is not None


def test_a_seed_is_that_of_the_training_too(backbone: object) -> None:
    few = shots.draw(TASK, 6, 0)
    one, same, other = (
        adapt(few, backbone, seed=seed, only=["cold lora"], priors={"cold lora": Prior(0.9, 0.01)})  # type: ignore[arg-type]
        for seed in (0, 0, 1)
    )
    assert one.trial and same.trial and other.trial
    assert one.trial.id == same.trial.id != other.trial.id
    weights = [(Path(found.adapter) / "adapter_model.safetensors").read_bytes() for found in (one, other)]
    assert weights[0] != weights[1]


def test_where_nothing_may_stand_before_a_prompt_matrices_are_tried() -> None:
    session = Session(tiny("minicpm3"), TASK)
    assert {way.name for way in strategies(session, [], {})} == {"cold lora"}


def test_what_the_backbone_cannot_take_is_passed_over() -> None:
    """GPT-2 knows 64 positions here, and a prefix needs 16."""
    few = shots.draw(replace(made.classification(longest=44, seed=3), name="long"), 4, 0)
    backbone = tiny("gpt2")
    with pytest.raises(UserError, match="more than the positions"):
        run_trial(Session(backbone, few), cold(4)["prefix"], steps=1)
    found = adapt(few, backbone, priors=LIKED | {"cold lora": Prior(0.8, 0.01)})
    assert found.chosen is not None and found.chosen.strategy == "cold lora"
    assert "cold prefix" not in {judged.strategy for judged in found.judged}
