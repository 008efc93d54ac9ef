"""Switched trainings: nothing is forgotten at an exchange, budgets hold, failures and kills are survived."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metapeft.errors import MetapeftError
from metapeft.peft import adapters, checkpoints
from metapeft.switching import handover, run
from metapeft.switching.advice import Basis
from metapeft.switching.decide import Policy, differing
from metapeft.training.evaluation import evaluate, untuned
from metapeft.training.session import Session
from tests.backbones.tiny import tiny_folder
from tests.switching import made
from tests.training import made as training

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def session() -> Session:
    return made.session()


EXCHANGES = (
    ("p_tuning", "lora", "frozen"),
    ("lora", "adalora", "frozen"),
    ("prompt", "prefix", "converted"),
    ("p_tuning", "prompt", "converted"),
    ("lora", "prefix", "gated"),
    ("lora", "prompt", "distilled"),
    ("adalora", "p_tuning", "distilled"),
)


@pytest.mark.parametrize(("first", "second", "how"), EXCHANGES)
def test_an_exchange_hands_over_what_was_learned(
    session: Session, first: str, second: str, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = Policy(looks=4, tolerance=1.0)  # on a random model distillation may do what it likes
    trial, record = made.train(session, tmp_path / "x", first, second, policy=policy, steps=60, **{second: 0.9})
    assert [leg.how for leg in record.legs] == ["", how]
    assert f"exchange: from {first} to {second} ({how}): {second} is expected to gain" in capsys.readouterr().err
    assert record.kept == 1 or record.back
    change = record.legs[1].change
    assert change is not None and change["examples"] == 12
    if how != "distilled":
        assert change["largest"] < 1e-3 and change["answers"] == 0
    assert record.decisions[0]["decision"]["to"] == 1
    assert differing(record.decisions) == []
    assert trial.method == "switching" and trial.status == "ok"
    assert {row["leg"] for row in trial.curve} == {0, 1}
    assert [row["step"] for row in trial.curve] == sorted(row["step"] for row in trial.curve)
    # What was measured is what lies in the folder, and nothing else is left.
    loaded = adapters.load(tmp_path / "x", session.model)
    loaded.attach(session.model)
    score = evaluate(session, loaded, "test")
    loaded.detach(session.model)
    assert trial.score is not None and score.value == trial.score.value
    assert score.loss == pytest.approx(trial.score.loss, rel=1e-4)
    assert checkpoints.read(tmp_path / "x").metadata["switching"]["legs"][1]["how"] == how
    assert not (tmp_path / "x.legs").exists()


def test_distillation_brings_outputs_closer(session: Session, tmp_path: Path) -> None:
    """Against the same virtual tokens as they would start."""
    made.train(session, tmp_path / "x", "lora", steps=40)
    old = adapters.load(tmp_path / "x", session.model)
    given = handover.handover(session, old, run.full(made.SMALL["prompt"]), seed=0)
    assert given.how == "distilled" and given.prepare is not None
    guarded = handover.guard(session, "distilled")
    before = handover.predicted(session, old, guarded)
    with handover.over(session, given.below) as upper:
        from metapeft.peft import create, parse

        adapter = create(parse("prompt", {"tokens": 4}), upper.model, seed=0, text_ids=[5, 6, 7, 8])
        adapter.attach(upper.model)
        fresh = handover.change(session, guarded, before, handover.predicted(upper, adapter, guarded))
        given.prepare(upper, adapter)
        adapter.detach(upper.model)
        distilled = handover.change(session, guarded, before, handover.predicted(upper, adapter, guarded))
    assert distilled.mean < fresh.mean


@pytest.mark.parametrize("tolerance", [1.0, -2.0])
def test_where_nothing_was_learned_the_next_begins_afresh(session: Session, tmp_path: Path, tolerance: float) -> None:
    policy = Policy(looks=4, tolerance=tolerance)
    unmatched = 0.95  # what the backbone is told to score: no look is above it
    trial, record = made.train(
        session, tmp_path / "x", "lora", "prefix", policy=policy, steps=60, untuned=unmatched, prefix=0.9
    )
    assert record.legs[1].how == "fresh" and record.legs[1].change is not None
    if tolerance < 0:  # nothing is good enough: the old adapter is there still
        assert record.legs[1].undone and record.legs[2].returns and record.legs[2].how == "frozen"
        return
    bare = evaluate(session, None, "validation", handover.guard(session, "fresh"))
    assert record.legs[1].change["score_after"] == bare.value
    assert trial.score is not None
    kept = adapters.load(tmp_path / "x", session.model)
    assert handover.tokens(kept) == ("none" if record.back else "keys")
    assert (handover.parts(kept)[0] is None) != record.back  # of the two, one alone


def test_the_backbones_known_answers_are_not_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The change at a fresh start is the same whether they were known before or not."""
    session, changes, asked = made.session(), [], []

    def counted(at: Session, adapter: Any, *rest: Any) -> Any:
        asked.append(adapter)
        return predict(at, adapter, *rest)

    predict = handover.predict
    monkeypatch.setattr(handover, "predict", counted)
    for known in (False, True):
        if known:
            untuned(session, "validation")
        asked.clear()
        policy = Policy(looks=4, tolerance=1.0)
        place = tmp_path / f"{known}"
        _, record = made.train(session, place, "lora", "prefix", policy=policy, steps=60, untuned=0.95, prefix=0.9)
        assert record.legs[1].how == "fresh"
        changes.append(record.legs[1].change)
        assert asked.count(None) == (0 if known else 1)
    assert changes[0] == pytest.approx(changes[1], rel=1e-6)


def test_looks_are_of_the_training_and_two_at_least_of_a_method(session: Session, tmp_path: Path) -> None:
    _, record = made.train(session, tmp_path / "x", "prompt", "lora", "adalora", steps=90, lora=0.9, adalora=0.8)
    looks = [leg.configuration["evaluations"] for leg in record.legs]
    made_before = 0
    for number, leg in enumerate(record.legs):
        assert looks[number] == max(2, made.POLICY.looks - made_before)
        assert leg.trial is not None
        made_before += len(leg.trial["curve"])
    assert len(looks) == 3


def test_two_exchanges_lie_on_each_other(session: Session, tmp_path: Path) -> None:
    trial, record = made.train(session, tmp_path / "x", "prompt", "lora", "adalora", steps=90, lora=0.9, adalora=0.8)
    assert [leg.configuration["method"] for leg in record.legs] == ["prompt", "lora", "adalora"]
    assert all(leg.change is None or leg.change["largest"] < 1e-3 for leg in record.legs)
    assert trial.score is not None
    assert len(record.decisions) >= 2 and record.switches() <= made.POLICY.most


def test_the_budget_holds(session: Session, tmp_path: Path) -> None:
    _, record = made.train(session, tmp_path / "x", "p_tuning", "lora", lora=0.9)
    assert record.budget_seconds == made.PRICE.seconds(30, 4)
    first, second = record.legs
    stopped = record.decisions[0]["evidence"]
    spent = made.PRICE.seconds(stopped["step"], 1)
    looks = made.POLICY.looks - 1  # the first leg was looked at once
    assert second.configuration["evaluations"] == looks
    assert second.trial is not None and len(second.trial["curve"]) == looks
    spent += made.PRICE.exchange("frozen") + made.PRICE.seconds(second.steps, looks)
    assert record.budget_seconds - made.PRICE.step < spent <= record.budget_seconds
    assert first.steps == 30 and second.steps < 30


def test_without_anything_better_it_is_the_static_training(session: Session, tmp_path: Path) -> None:
    trial, record = made.train(session, tmp_path / "x", "lora", "prefix", prefix=-0.5)
    static = run.run_trial(session, record.legs[0].configuration, steps=30, folder=tmp_path / "static")
    assert len(record.legs) == 1 and record.decisions
    assert trial.score == static.score and trial.id != static.id
    assert (tmp_path / "x" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "static" / "adapter_model.safetensors"
    ).read_bytes()


def test_a_change_that_loses_too_much_is_undone(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An exchange to what forgets everything: the method in hand goes on, on what it had learned."""

    def forgets(upper: Any, adapter: Any, cached: Any, rate: float) -> None:
        adapter.module.update({"value": 30 * adapter.module.value})

    monkeypatch.setattr(handover, "_distil", forgets)
    policy = Policy(looks=4, tolerance=-2.0)  # nothing is good enough
    trial, record = made.train(session, tmp_path / "x", "lora", "prompt", policy=policy, steps=60, prompt=0.9)
    assert [leg.undone for leg in record.legs] == [False, True, False]
    assert "exchange undone: it changed too much; lora goes on" in capsys.readouterr().err
    assert record.legs[2].returns and record.legs[2].how == "frozen" and trial.score is not None
    assert record.legs[2].change is not None and record.legs[2].change["largest"] < 1e-3


def test_a_method_that_fails_is_exchanged(session: Session, tmp_path: Path) -> None:
    given = made.advice("adalora", "prefix", prefix=0.8)
    start = {"method": "adalora", "learning_rate": 2e9, "alpha": 2e9, "clip": 0.0}
    trial, record = run.train(session, start, lambda _: given, steps=60, folder=tmp_path / "x", policy=Policy(looks=2))
    assert record.legs[0].trial is not None and record.legs[0].trial["status"] == "diverged"
    assert record.legs[1].forced and record.legs[1].configuration["method"] == "prefix"
    assert trial.status == "ok" and differing(record.decisions) == []


def test_what_follows_a_failure_is_charged_no_exchange(session: Session, tmp_path: Path) -> None:
    given = made.advice("adalora", "prefix", "lora", prefix=0.8, lora=0.9)
    given = replace(given, forecaster=made.Changing({"prefix": 0.95, "lora": 0.9}, {"prefix": 0.0, "lora": 0.9}, 0.3))
    start = {"method": "adalora", "learning_rate": 2e9, "alpha": 2e9, "clip": 0.0}
    _, record = run.train(session, start, lambda _: given, steps=60, folder=tmp_path / "x", policy=Policy(looks=4))
    assert [leg.configuration["method"] for leg in record.legs] == ["adalora", "prefix", "lora"]
    assert record.legs[1].forced and record.legs[1].how == ""
    at = next(d["evidence"] for d in record.decisions if d["evidence"]["leg"] == 1)
    failed = made.PRICE.seconds(0, 0)  # before its first look
    assert at["seconds_left"] == pytest.approx(record.budget_seconds - failed - made.PRICE.seconds(at["step"], 1))


def test_what_failed_is_decided_once_however_often_it_is_started(session: Session, tmp_path: Path) -> None:
    start = {"method": "adalora", "learning_rate": 2e9, "alpha": 2e9, "clip": 0.0}
    unlikely = made.advice("adalora", "prefix", prefix=-0.8)
    for _ in range(2):
        with pytest.raises(MetapeftError, match="diverged"):
            run.train(session, start, lambda _: unlikely, steps=60, folder=tmp_path / "y", policy=Policy(looks=2))
    record = json.loads((tmp_path / "y.legs" / "switching.json").read_text(encoding="utf-8"))
    assert len(record["decisions"]) == 1 and record["decisions"][0]["decision"]["to"] == 0


@pytest.mark.parametrize("damaged", [False, True])
def test_one_that_goes_on_asks_for_the_advice_of_before(session: Session, tmp_path: Path, damaged: bool) -> None:
    basis = Basis(3, ("some", "trials"))
    given = replace(made.advice("p_tuning", "lora", lora=0.9), basis=basis)
    asked: list[Basis | None] = []

    def advice(found: Basis | None) -> Any:
        asked.append(found)
        return given

    def killed(event: dict[str, Any]) -> bool:
        raise KeyboardInterrupt

    arguments = {"steps": 30, "folder": tmp_path / "x", "policy": made.POLICY}
    with pytest.raises(KeyboardInterrupt):
        run.train(session, made.SMALL["p_tuning"], advice, **arguments, progress=killed)
    if damaged:
        (tmp_path / "x.legs" / run.BASIS).write_text("[" * 9)
    run.train(session, made.SMALL["p_tuning"], advice, **arguments)
    assert asked == [None, None if damaged else basis]


def test_asked_again_it_is_read_not_trained(session: Session, tmp_path: Path) -> None:
    first = made.train(session, tmp_path / "x", "p_tuning", "lora", lora=0.9)
    (tmp_path / "x.legs").mkdir()  # as a kill at the very end leaves it

    def never(basis: Any) -> Any:
        raise AssertionError("asked for advice")

    again = run.train(session, made.SMALL["p_tuning"], never, steps=30, folder=tmp_path / "x", policy=made.POLICY)
    assert again == first and first[0].adapter_bytes > 0
    assert not (tmp_path / "x.legs").exists()


def start(folder: Path, methods: tuple[str, ...]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.switching.killed", str(tiny_folder("llama")), str(folder), *methods]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=dict(os.environ))


def result(folder: Path) -> tuple[bytes, list[Any], list[Any]]:
    record = json.loads(next(folder.glob("*metapeft.json")).read_text(encoding="utf-8"))["metadata"]["switching"]
    decisions = [(d["evidence"]["leg"], d["evidence"]["step"], d["decision"]["to"]) for d in record["decisions"]]
    legs = [(leg["configuration"], leg["steps"], leg["how"]) for leg in record["legs"]]
    weights = b"".join(path.read_bytes() for path in sorted(folder.glob("*adapter_model.safetensors")))
    return weights, decisions, legs


@pytest.mark.parametrize("methods", [("p_tuning", "lora", "prefix"), ("lora", "prefix")])
def test_killed_at_any_moment_and_started_again_ends_with_the_same_bits(
    tmp_path: Path, methods: tuple[str, ...]
) -> None:
    child = start(tmp_path / "whole", methods)
    lines = child.communicate(timeout=300)[0].splitlines()
    assert child.returncode == 0 and any(line.startswith("leg 1") for line in lines)
    assert (result(tmp_path / "whole")[2][1][2] == "gated") == (methods == ("lora", "prefix"))
    first = sum(line.startswith("leg 0") for line in lines)
    chance = random.Random(0)
    # In the first leg, at the exchange, and after it.
    for after in (3, first - 1, first, 2):
        child = start(tmp_path / "killed", methods)
        assert child.stdout is not None
        for n, _ in enumerate(child.stdout, 1):
            if n >= after:
                time.sleep(chance.uniform(0, 0.1))
                child.kill()
                break
        child.stdout.close()
        child.wait(60)
    child = start(tmp_path / "killed", methods)
    assert "done" in child.communicate(timeout=300)[0]
    assert result(tmp_path / "killed") == result(tmp_path / "whole")


def test_an_exchange_to_what_the_backbone_cannot_take_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2 knows 64 positions here."""
    monkeypatch.setitem(made.SMALL, "prefix", made.SMALL["prefix"] | {"tokens": 60})
    session = training.session("gpt2", task=training.classification(longest=20))
    policy = Policy(looks=4, tolerance=1.0)
    trial, record = made.train(
        session, tmp_path / "x", "lora", "prefix", policy=policy, steps=60, prefix=0.9, untuned=0.95
    )
    exchange, back = record.legs[1:]
    assert exchange.undone and "more than the positions" in exchange.why
    assert back.returns and back.configuration["method"] == "lora" and trial.status == "ok"
    assert record.switches() == 1
