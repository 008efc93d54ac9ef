"""What is taken off the held-out score of a choice: judged where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from metapeft.fewshot import choose
from metapeft.fewshot.choose import Held, Prior, Strategy
from metapeft.fewshot.measure import Answers
from metapeft.fewshot.optimism import corrected, optimism

WEAK = Prior(0.1, 10.0)  # the shots decide


def guessing(random: np.random.Generator, shots: int, share: float) -> Answers:
    hit = (random.random(shots) < share).astype(float)
    return Answers(hit, 0.1 + 0.8 * hit, 1 - hit)


def test_of_strategies_that_are_all_alike_the_best_looks_better_than_it_is() -> None:
    """The winner of nine that are right half of the time, on 24 shots. Drawn shots and all shots share most of their
    noise, so that the larger part of the lead is taken off, not all of it."""
    looked, corrected = [], []
    for seed in range(30):
        random = np.random.default_rng(seed)
        names = [f"s{i}" for i in range(9)]
        held = {name: Held({10: guessing(random, 24, 0.5)}) for name in names}
        ways = [Strategy(name, {}) for name in names]
        untuned = guessing(random, 24, 0.0)
        chosen = choose.choose(ways, held, untuned, dict.fromkeys(names, WEAK)).chosen
        assert chosen is not None
        looked.append(held[chosen.strategy].answers[10].hit.mean())
        corrected.append(looked[-1] - optimism(ways, held, untuned, dict.fromkeys(names, WEAK)))
    lead, left = np.mean(looked) - 0.5, np.mean(corrected) - 0.5
    assert lead > 0.1
    assert 0 <= left < lead / 2


def test_a_choice_that_the_shots_had_no_part_in_is_taken_at_its_word() -> None:
    random = np.random.default_rng(0)
    ways, sure = [Strategy("only", {}), Strategy("other", {})], {"only": Prior(0.9, 1e-3), "other": Prior(0.1, 1e-3)}
    held = {way.name: Held({10: guessing(random, 30, 0.5)}) for way in ways}
    assert optimism(ways, held, guessing(random, 30, 0.5), sure) < 0.02


@pytest.mark.parametrize("shots", [2, 3, 8])
def test_few_shots_and_an_untuned_choice(shots: int) -> None:
    """Between 0 and 1 and the same again, also where some resamples leave the backbone untuned."""
    random = np.random.default_rng(shots)
    ways = [Strategy("a", {}), Strategy("b", {}, rival="a")]
    held = {way.name: Held({0: guessing(random, shots, 0.6), 10: guessing(random, shots, 0.6)}) for way in ways}
    first, again = (optimism(ways, held, guessing(np.random.default_rng(1), shots, 0.6), {}) for _ in range(2))
    assert 0 <= first == again <= 1


def one(prior: Prior, hits: float, measured: bool = True) -> choose.Choice:
    """One strategy beside a backbone that is never right, on 20 shots."""
    answers = guessing(np.random.default_rng(0), 20, hits)
    nothing = Answers(np.zeros(20), np.zeros(20), np.ones(20))
    return choose.choose(
        [Strategy("only", {})], {"only": Held({10: answers})} if measured else {}, nothing, {"only": prior}
    )


@pytest.mark.parametrize(("deviation", "share"), [(1e3, 1.0), (1e-6, 0.0)])
def test_what_choosing_adds_is_taken_off_the_evidence_not_off_the_prior(deviation: float, share: float) -> None:
    before = one(Prior(0.5, deviation), 0.9).chosen
    after = corrected(one(Prior(0.5, deviation), 0.9), 0.2, {"only": Prior(0.5, deviation)})
    assert before is not None and after.chosen is not None and after.judged == (after.chosen,)
    assert before.gain - after.chosen.gain == pytest.approx(0.2 * share, abs=1e-6)
    assert after.chosen.p_better == choose.chance(after.chosen.gain, before.deviation) <= before.p_better


def test_it_is_the_belief_in_evidence_that_is_less_good() -> None:
    prior = Prior(0.1, 0.2)
    differences = np.random.default_rng(3).normal(0.3, 0.4, 12)
    gain, deviation = choose.belief(differences, prior)
    judged = choose.Judged("only", 10, 0.3, 0.1, gain, deviation, choose.chance(gain, deviation), 0.0)
    found = corrected(choose.Choice(judged, (judged,), 0.0), 0.05, {"only": prior}).chosen
    assert found is not None
    assert found.gain == pytest.approx(choose.belief(differences - 0.05, prior)[0])


def test_where_nothing_is_left_the_backbone_stays_untuned() -> None:
    found = corrected(one(Prior(0.0, 1e3), 0.2), 0.5, {"only": Prior(0.0, 1e3)})
    assert found.chosen is None and found.judged[0].gain < 0 and found.judged[0].p_better < 0.5


def test_what_no_shot_has_judged_is_not_corrected() -> None:
    unseen = one(Prior(0.3, 0.1), 0.0, measured=False)
    assert unseen.chosen is not None and corrected(unseen, 0.2, {"only": Prior(0.3, 0.1)}) == unseen
