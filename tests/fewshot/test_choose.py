"""The choice follows the shots as far as there are any, and the prior where there are none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metapeft.data import shots
from metapeft.fewshot import choose
from metapeft.fewshot.choose import Held, Prior, Strategy
from metapeft.fewshot.measure import Answers, answers
from tests.backbones.tiny import tiny
from tests.training import made


def told(right: list[float] | np.ndarray) -> Answers:
    value = np.array(right, dtype=float)
    return Answers((value > 0.5).astype(float), value, -np.log(np.maximum(value, 1e-9)))


def test_without_shots_the_prior_decides_and_with_many_the_shots_do() -> None:
    prior = Prior(0.3, 0.1)
    assert choose.belief(np.zeros(0), prior) == (0.3, 0.1)
    means = [choose.belief(np.full(n, -0.2), prior)[0] for n in (1, 4, 16, 64, 4096)]
    assert means == sorted(means, reverse=True) and 0.2 < means[0] < 0.3 and means[-1] == pytest.approx(-0.2, abs=0.01)


@given(
    differences=st.lists(st.floats(-1, 1), min_size=1, max_size=64),
    mean=st.floats(-0.5, 0.5),
    deviation=st.floats(0.01, 1.0),
)
@settings(max_examples=80, deadline=None)
def test_a_belief_lies_between_what_was_seen_and_the_prior(
    differences: list[float], mean: float, deviation: float
) -> None:
    seen = np.array(differences)
    believed, unsure = choose.belief(seen, Prior(mean, deviation))
    low, high = sorted((mean, float(seen.mean())))
    assert low - 1e-9 <= believed <= high + 1e-9 and 0 < unsure <= deviation


def test_the_best_is_chosen_with_its_best_steps() -> None:
    ways = [Strategy("context", context=True), Strategy("cold lora", {})]
    held = {
        "context": Held({0: told([0.6, 0.7, 0.4, 0.6])}),
        "cold lora": Held({10: told([0.4] * 4), 20: told([0.9] * 4), 40: told([0.9] * 4)}),
    }
    found = choose.choose(ways, held, told([0.3, 0.2, 0.4, 0.3]), {})
    assert found.chosen is not None and (found.chosen.strategy, found.chosen.steps) == ("cold lora", 20)
    assert [j.strategy for j in found.judged] == ["cold lora", "context"]
    assert found.chosen.difference > found.chosen.gain > 0 and found.chosen.p_better > 0.9 and found.ahead > 0
    against = choose.choose(ways, held, told([0.3, 0.2, 0.4, 0.3]), {"cold lora": Prior(-0.5, 0.05)})
    assert against.chosen is not None and against.chosen.strategy == "context", "a strong prior outweighs four shots"


def test_the_untuned_backbone_stays_where_nothing_is_expected_to_gain() -> None:
    ways = [Strategy("context", context=True), Strategy("cold lora", {})]
    held = {"context": Held({0: told([0.1] * 8)}), "cold lora": Held({10: told([0.2] * 8)})}
    assert choose.choose(ways, held, told([0.9] * 8), {}).chosen is None
    assert choose.choose(ways, {}, told([0.9]), {"context": Prior(-0.1, 0.2)}).chosen is None
    assert choose.choose(ways, {}, told([0.9]), {"context": Prior(0.1, 0.2)}).chosen is not None


def test_negative_transfer_is_said_and_avoided() -> None:
    ways = [Strategy("cold lora", {}), Strategy("nearest lora", {}, rival="cold lora")]
    cold, harm, help = told([0.7] * 12), told([0.55] * 12), told([0.95] * 12)
    for transferred, avoided in ((harm, True), (help, False)):
        held = {"cold lora": Held({10: cold}), "nearest lora": Held({10: transferred})}
        # A prior that would have the transferred start chosen whatever the shots say.
        found = choose.choose(ways, held, told([0.2] * 12), {"cold lora": Prior(0.0, 0.3)})
        by_name = {j.strategy: j for j in found.judged}
        transfer = by_name["nearest lora"].transfer
        assert transfer is not None and transfer.avoided == avoided and by_name["cold lora"].transfer is None
        assert np.sign(transfer.difference) == (-1 if avoided else 1) and transfer.standard_error > 0
        assert found.chosen is not None and found.chosen.strategy == ("cold lora" if avoided else "nearest lora")


def test_nobody_answers_a_shot_that_it_was_trained_on() -> None:
    """What is learned from is every other shot; answers come back in the order of the shots."""
    task = shots.draw(made.classification(), 6, 0)
    folds = choose.sessions(tiny("llama"), task, 3)
    for session, held in folds:
        rest = [e for i, e in enumerate(task.train) if i not in held]
        assert list(session.task.train) == rest
        assert list(session.task.validation) == [task.train[i] for i in held]
    held_out = choose.cross_validate(Strategy("untuned"), folds).answers[0]
    whole = choose.sessions(tiny("llama"), task, 6)[0][0]
    for i, example in enumerate(task.train):
        for session, held in folds:
            if i in held:
                assert session.task.validation[held.index(i)] == example
    assert held_out.right.shape == (6,) and whole is not None
    again = np.zeros(6)
    for session, held in folds:
        again[held] = answers(session, None, "validation").right
    np.testing.assert_allclose(held_out.right, again)


def test_a_diverged_strategy_is_lost_not_an_error() -> None:
    task = shots.draw(made.classification(), 6, 0)
    folds = choose.sessions(tiny("llama"), task, 2)
    wild = {"method": "lora", "rank": 2, "learning_rate": 1e6, "clip": 0.0, "warmup": 0.0}
    found = choose.cross_validate(Strategy("wild", wild), folds, (5, 30)).answers
    assert set(found) == {5, 30} and found[30].right.max() < 0.6


@pytest.mark.parametrize(("deviation", "share"), [(1e3, 1.0), (0.3, None), (1e-6, 0.0)])
def test_what_choosing_adds_is_taken_off_the_evidence_not_off_the_prior(deviation: float, share: float | None) -> None:
    ways = [Strategy("good", {}), Strategy("better", {}), Strategy("unseen", {})]
    held = {"good": Held({10: told([0.7, 0.8, 0.2, 0.6])}), "better": Held({10: told([0.9, 0.8, 0.4, 0.7])})}
    untuned, priors = told([0.1] * 4), dict.fromkeys(("good", "better", "unseen"), Prior(0.2, deviation))
    before = {j.strategy: j for j in choose.choose(ways, held, untuned, priors).judged}
    choice = choose.choose(ways, held, untuned, priors, too_good=0.1)
    after = {j.strategy: j for j in choice.judged}
    for name in held:
        weight = 1 - (before[name].deviation / deviation) ** 2 if share is None else share
        assert before[name].gain - after[name].gain == pytest.approx(0.1 * weight, abs=1e-5)
        assert after[name].difference == before[name].difference and after[name].p_better <= before[name].p_better
    assert after["unseen"] == before["unseen"]
    assert choice.chosen == choice.judged[0] and choice.ahead == pytest.approx(
        choice.judged[0].gain - choice.judged[1].gain
    )


def test_where_choosing_explains_it_all_the_backbone_stays_untuned() -> None:
    ways, held = [Strategy("lucky", {})], {"lucky": Held({10: told([0.2, 0.7, 0.1])})}
    untuned, wide = told([0.1] * 3), {"lucky": Prior(0.0, 1e3)}
    assert choose.choose(ways, held, untuned, wide).chosen is not None
    assert choose.choose(ways, held, untuned, wide, too_good=0.9).chosen is None
