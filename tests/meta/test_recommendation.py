"""Recommendations: their shape, what they rest on, budgets, preferences, and whether intervals hold."""

from __future__ import annotations

import json
import re
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metapeft.errors import UserError
from metapeft.meta import Experience, Recommendation, costs, recommend
from metapeft.meta import recommendation as module
from metapeft.meta.evidence import Known, gather, without
from metapeft.meta.fitting import fit, groups
from metapeft.meta.forecast import forecast, untuned_of
from metapeft.meta.model import Conditioned, Model
from metapeft.peft import METHODS
from metapeft.profiling import Profile, cache
from metapeft.settings import home, load_settings
from metapeft.training.configuration import full
from metapeft.training.trial import Score
from tests.meta.made import CONTENT, SPEED, profile, task, trial
from tests.meta.synthetic import world

HELD = {"sentiment", "knowledge", "string"}


@pytest.fixture
def store(tmp_path: Path) -> Experience:
    return Experience(tmp_path / "experience", shipped=None)


def asked(store: Experience, measured: Profile | None = None, **wanted: Any) -> Recommendation:
    return recommend(task(), measured or profile(), load_settings(recommend=wanted), store, SPEED)


def test_a_process_predicts_by_the_profiles_that_are_kept_now() -> None:
    """Observations are equal whatever their features are; what is predicted from them is not."""
    known = world(8, seed=3).observations()
    model = fit(known)
    other = [replace(o, task=replace(o.task, features={k: v + 1 for k, v in o.task.features.items()})) for o in known]  # type: ignore[union-attr]
    assert known == other
    first = module._conditioned(model, known)
    assert module._conditioned(model, list(known)) is first
    assert module._conditioned(model, other) is not first


def test_without_experience_it_is_the_portfolio_and_says_so(store: Experience) -> None:
    found = asked(store)
    record = json.loads(json.dumps(found.to_json()))
    assert Recommendation.from_json(record) == found
    agreed = {"task", "basis", "recommendations", "neighbours"}
    more = {
        "id",
        "task_version",
        "backbone",
        "advice",
        "model",
        "tasks",
        "trials",
        "untuned",
        "together",
        "steps",
        "prefer",
        "metric",
    }
    assert found.together[0] == 1 and len(set(found.together)) == module.TOGETHER
    assert Recommendation.from_json({k: v for k, v in record.items() if k != "together"}).together == ()
    assert set(record) == agreed | more and "too little evidence" in record["advice"]
    assert (record["task"], record["basis"], record["neighbours"]) == ("spam", "portfolio", [])
    keys = {"rank", "method", "configuration", "score", "p_best", "p_within_1pct", "seconds", "peak_memory_mb"}
    for rank, entry in enumerate(record["recommendations"], 1):
        assert set(entry) == keys | {"adapter_bytes", "likely"} and entry["rank"] == rank
        assert set(entry["score"]) == {"mean", "low", "high", "level"}
        assert entry["score"]["low"] <= entry["likely"]["low"] < entry["likely"]["high"] <= entry["score"]["high"]
        assert 0 <= entry["score"]["low"] < entry["score"]["mean"] < entry["score"]["high"] <= 1
        assert full(entry["configuration"])["method"] == entry["method"]
        assert entry["seconds"] > 0 and entry["peak_memory_mb"] > 500 and entry["adapter_bytes"] > 1000
        assert 0 < entry["p_best"] <= entry["p_within_1pct"] < 1
    assert sum(e["p_best"] for e in record["recommendations"]) == pytest.approx(1, abs=0.01)
    assert {e["method"] for e in record["recommendations"]} == {"lora", "adalora", "prompt", "prefix", "p_tuning"}
    assert asked(store) == found  # deterministic


def test_ignorance_is_wide_and_ends_where_scores_end(store: Experience) -> None:
    for untuned in (0.0, 0.5, 0.97):
        first = asked(store, profile(untuned=untuned)).recommendations[0].score
        assert first.high - first.low > 0.6 * (1 - untuned) and first.level == 0.9
        assert first.low < first.mean < first.high
    assert asked(store, profile(untuned=0.97)).recommendations[0].score.mean > 0.9


def test_advice_does_not_contradict_its_own_numbers(store: Experience) -> None:
    lost = [trial(0.85, untuned=0.9, method=method, seed=seed) for method in METHODS for seed in range(3)]
    store.extend(lost)
    found = asked(store, profile(untuned=0.9))
    first = found.recommendations[0]
    assert first.score.mean <= found.untuned.score == 0.9 and "untuned" in found.advice
    assert not found.advice.startswith("Use")
    assert found.untuned.standard_error == 0.03, "as the trials measured it"


def test_an_untuned_score_by_another_metric_is_not_the_tasks(store: Experience) -> None:
    store.append(replace(trial(0.9), untuned_score=Score("macro_f1", 0.1, 0.02, 300, 1.0)))
    assert asked(store, profile(untuned=0.5)).untuned.score == 0.5


def test_what_frozen_features_reach_is_a_hint_upwards_only(store: Experience) -> None:
    nothing, weak, strong, common = (
        asked(store, profile(untuned=0.3, **known)).recommendations[0].score
        for known in ({}, {"probe_accuracy": 0.4}, {"probe_accuracy": 0.96}, {"majority_share": 0.9})
    )
    assert weak.mean == pytest.approx(nothing.mean, abs=0.005) and strong.mean > common.mean > nothing.mean + 0.05
    assert 0.75 < strong.mean < 0.96 and strong.low > nothing.low


def test_trials_of_the_task_count_at_once(store: Experience) -> None:
    store.extend([trial(0.95, learning_rate=4e-4, rank=4), trial(0.55, learning_rate=1e-3)])
    found = asked(store, prefer="accuracy")
    first = found.recommendations[0]
    assert found.basis == "experience"
    assert (first.configuration["learning_rate"], first.configuration["rank"]) == (4e-4, 4)
    assert first.score.mean == pytest.approx(0.95, abs=0.03) and first.score.high - first.score.low < 0.15
    assert first.p_best == max(r.p_best for r in found.recommendations) > 0.3
    tried = next(r for r in found.recommendations if full(r.configuration) == full({"method": "lora"}))
    assert tried.score.mean < 0.65 and tried.p_best < 0.05


def test_other_tasks_count_once_there_are_enough(store: Experience) -> None:
    def grow(name: str) -> None:
        store.extend([trial(0.9, name, method="prompt"), trial(0.6, name), trial(0.55, name, method="prefix")])

    for index in range(module.LEAST_TASKS - 1):
        grow(f"task{index}")
    assert asked(store).basis == "portfolio"
    grow("last")
    found = asked(store, prefer="accuracy")
    assert found.basis == "experience"
    assert found.recommendations[0].method == "prompt"
    assert full(found.recommendations[0].configuration) == full(
        {"method": "prompt"}
    )  # tried there, not in the portfolio
    other = trial(0.99, backbone="another backbone", method="adalora")
    store.append(other)
    assert asked(store, prefer="accuracy").recommendations[0].method == "prompt"


def test_failures_teach(store: Experience) -> None:
    def entry(rate: float) -> Any:
        wanted = full({"method": "lora", "learning_rate": rate})
        return next((r for r in asked(store).recommendations if full(r.configuration) == wanted), None)

    before = entry(1e-3)
    store.append(trial(None, status="diverged", learning_rate=1e-3))
    after = entry(1e-3)
    assert after.score.mean < before.score.mean - 0.1 and after.rank > before.rank
    store.append(trial(None, status="out_of_memory", learning_rate=3e-4))
    assert entry(3e-4) is None
    without = entry(1e-3)
    store.append(trial(None, status="failed", learning_rate=1e-3, seed=1))
    assert entry(1e-3) == without


def test_hard_budgets_leave_out_what_exceeds_them(store: Experience) -> None:
    everything = asked(store).recommendations
    seconds = sorted(r.seconds for r in everything)[2]
    kept = asked(store, max_seconds=seconds + 0.1).recommendations
    assert 0 < len(kept) < len(everything) and all(r.seconds <= seconds + 0.1 for r in kept)
    assert [r.rank for r in kept] == list(range(1, len(kept) + 1))
    assert sum(r.p_best for r in kept) == pytest.approx(1, abs=0.01)
    least = min(everything, key=lambda r: r.seconds)
    with pytest.raises(UserError, match=rf"max_seconds=1 .* \({least.method}\)") as error:
        asked(store, max_seconds=1)
    assert asked(store, max_seconds=need(error.value, "s")).recommendations[0].seconds == least.seconds
    with pytest.raises(UserError, match="max_memory_mb=10 ") as error:
        asked(store, max_memory_mb=10)
    assert asked(store, max_memory_mb=need(error.value, "MB")).recommendations  # what it says is enough, is enough
    assert "steps" not in str(error.value), "fewer steps need hardly less"


def test_what_this_machine_cannot_hold_is_not_recommended(
    store: Experience, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = asked(store).recommendations
    needs = sorted(r.peak_memory_mb for r in everything)
    assert needs[0] < needs[-1]
    monkeypatch.setenv("METAPEFT_MEMORY_MB", str(needs[-1] - 0.01))
    kept = asked(store).recommendations
    assert len(kept) > 0 and all(r.peak_memory_mb < needs[-1] for r in kept)
    assert capsys.readouterr().err == ""
    for_another = asked(store, max_memory_mb=needs[-1] + 1).recommendations
    assert {r.method for r in for_another} == {r.method for r in everything}, "whose memory is given"
    monkeypatch.setenv("METAPEFT_MEMORY_MB", "1")
    assert len(asked(store).recommendations) == len(everything)
    assert "no configuration fits into this machine's 1 MB" in capsys.readouterr().err


def need(error: UserError, unit: str) -> int:
    found = re.search(rf"smallest need is (\d+) {unit} ", str(error))
    assert found is not None
    return int(found.group(1))


def test_preferences_move_the_order_their_way(store: Experience) -> None:
    first = {p: asked(store, prefer=p).recommendations[0] for p in ("accuracy", "balanced", "speed", "memory")}
    assert first["accuracy"].score.mean >= max(r.score.mean for r in first.values())
    assert first["speed"].seconds == min(r.seconds for r in first.values()) < first["accuracy"].seconds * 1.01
    assert first["memory"].peak_memory_mb == min(r.peak_memory_mb for r in first.values())


def test_costs_are_corrected_by_what_was_measured_here(store: Experience) -> None:
    before = asked(store).recommendations
    wanted = full({"method": "lora", "learning_rate": 1e-3})
    slow = next(r for r in before if full(r.configuration) == wanted)
    for seed in range(9):
        store.append(
            trial(0.8, learning_rate=1e-3, seed=seed, seconds=3 * slow.seconds, peak_memory_mb=2 * slow.peak_memory_mb)
        )
    after = next(r for r in asked(store).recommendations if full(r.configuration) == wanted)
    assert after.seconds == pytest.approx(3 * slow.seconds, rel=0.15)
    assert after.peak_memory_mb == pytest.approx(2 * slow.peak_memory_mb, rel=0.1)
    assert after.adapter_bytes == slow.adapter_bytes


def test_seconds_of_another_processor_and_of_a_busy_machine_do_not_count(store: Experience) -> None:
    before = {str(r.configuration): r.seconds for r in asked(store).recommendations}
    seconds = statistics.median(before.values())
    for seed in range(9):
        elsewhere = {"processor": "another, 64 cores"}
        store.append(trial(0.8, seed=seed, seconds=50 * seconds, versions=elsewhere))
    after = {str(r.configuration): r.seconds for r in asked(store).recommendations}
    both = before.keys() & after.keys()
    assert both and all(before[c] == after[c] for c in both)

    workers = SPEED.measured["workers"]
    quiet, busy = (trial(0.8, seconds=wall, cpu_seconds=workers * 10.0 / costs.WAITING) for wall in (10.0, 50.0))
    assert costs.undisturbed(quiet, SPEED) == pytest.approx(costs.undisturbed(busy, SPEED)) == pytest.approx(10.0)


def test_neighbours_are_known_tasks_with_like_profiles(store: Experience) -> None:
    for index, (untuned, words) in enumerate([(0.5, 0.1), (0.1, 0.9), (0.55, 0.12), (0.9, 0.5), (0.3, 0.3)]):
        name = f"task{index}"
        store.append(trial(0.9, name))
        other = profile(name, untuned=untuned, words_english=words)
        cache.write(home() / "profiles" / f"{other.task_version}-accuracy-{CONTENT}-1.json", other.to_json())
    found = asked(store, profile(words_english=0.1)).neighbours
    assert [n.task for n in found][:2] == ["task0", "task2"] and found[0].similarity == 1.0
    assert found[0].best["score"] == 0.9, "on the test split"
    similarities = [n.similarity for n in found]
    assert similarities == sorted(similarities, reverse=True) and all(0 <= s <= 1 for s in similarities)


def test_intervals_hold_what_they_say_on_tasks_never_seen() -> None:
    """A world with a known truth: the promised share of measured scores lies in the intervals."""
    found = world(40, filled=0.5)
    model = fit(without(found.observations(), HELD))
    told = Conditioned(model, without(found.observations(), HELD))
    inside = []
    for group in groups([o for o in found.observations() if o.task.family in HELD]):
        first = group[0]
        forecasted = forecast(told, first.task, [o.configuration for o in group], 40, untuned_of(group), 300)
        low, high = forecasted.interval(0.9)
        seen = np.array([o.score for o in group])
        inside += ((low <= seen) & (seen <= high)).tolist()
    assert len(inside) > 80 and 0.8 <= np.mean(inside) <= 0.99


def test_a_thousand_trials_are_quick(store: Experience) -> None:
    rates = [1e-4 * 1.5**i for i in range(10)]
    store.extend(
        trial(0.5 + 0.01 * (i % 40), f"task{i}", learning_rate=rate, method=method)
        for i in range(36)
        for method in ("lora", "prefix", "prompt")
        for rate in rates
    )
    found = asked(store)
    begin = time.process_time()
    again = asked(store)
    assert time.process_time() - begin < 0.5  # about a tenth of a second on an idle machine
    assert again == found and found.basis == "experience"


def test_a_machine_that_was_never_measured_gets_a_guess(store: Experience) -> None:
    found = recommend(task(), profile(), load_settings(), store)
    assert all(r.seconds > 1 for r in found.recommendations)


def test_what_differs_by_its_looks_alone_is_listed_once_and_with_the_usual_ones(store: Experience) -> None:
    store.extend([trial(0.9, learning_rate=1.5e-3, evaluations=2), trial(0.9, learning_rate=1.5e-3, seed=1)])
    configurations = [r.configuration for r in asked(store).recommendations]
    assert sum(c["method"] == "lora" and c["learning_rate"] == 1.5e-3 for c in configurations) == 1
    assert not any("evaluations" in c for c in configurations)


def test_what_ran_out_of_memory_once_and_ended_well_later_is_listed(store: Experience) -> None:
    failed = trial(None, status="out_of_memory", learning_rate=1.5e-3, budget=40)
    store.append(failed)
    listed = [r.configuration["learning_rate"] for r in asked(store).recommendations if r.method == "lora"]
    assert 1.5e-3 not in listed
    store.append(trial(0.9, learning_rate=1.5e-3))
    listed = [r.configuration["learning_rate"] for r in asked(store).recommendations if r.method == "lora"]
    assert 1.5e-3 in listed


def test_the_best_on_a_neighbour_is_what_was_measured_there(store: Experience) -> None:
    here, there = profile(), profile("other")
    observed = gather(
        [trial(0.5, "other", budget=40), trial(0.9, "other", budget=400)],
        {(there.task_version, there.backbone): there.features},
    )
    known = Known(here.task_version, here.backbone, "spam", "spam", 10, here.features, "accuracy")
    (near,) = module.neighbours(Model(), known, observed)
    assert (near.best["score"], near.best["untuned"]) == (0.9, 0.5)
