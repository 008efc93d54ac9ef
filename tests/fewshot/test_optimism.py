"""What is taken off the held-out score of a choice: judged where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from metapeft.fewshot import choose
from metapeft.fewshot.choose import Held, Prior, Strategy
from metapeft.fewshot.measure import Answers
from metapeft.fewshot.optimism import optimism

WEAK = Prior(0.1, 10.0)  # the shots decide


def guessing(random: np.random.Generator, shots: int, share: float) -> Answers:
    hit = (random.random(shots) < share).astype(float)
    return Answers(hit, 0.1 + 0.8 * hit, 1 - hit)


def test_of_strategies_that_are_all_alike_the_best_looks_better_than_it_is() -> None:
    """The winner of nine that are right half of the time, on 24 shots. Drawn shots and all shots share most of their
    noise, so that the larger part of the lead is taken off, not all of it."""
    looked, corrected, said, believed = [], [], [], []
    for seed in range(30):
        random = np.random.default_rng(seed)
        names = [f"s{i}" for i in range(9)]
        held = {name: Held({10: guessing(random, 24, 0.5)}) for name in names}
        ways = [Strategy(name, {}) for name in names]
        untuned = guessing(random, 24, 0.0)
        weak = dict.fromkeys(names, WEAK)
        chosen = choose.choose(ways, held, untuned, weak).chosen
        assert chosen is not None
        found = optimism(ways, held, untuned, weak)
        looked.append(held[chosen.strategy].answers[10].hit.mean())
        corrected.append(looked[-1] - found.score)
        said.append(chosen.gain)
        believed.append(choose.choose(ways, held, untuned, weak, found.gain).judged[0].gain)
    lead, left = np.mean(looked) - 0.5, np.mean(corrected) - 0.5
    assert lead > 0.1
    assert 0 <= left < lead / 2
    truth = 0.45  # a guess gains half of the hits, and 0.4 of the probability that untuned answers lack
    assert 0 <= np.mean(believed) - truth < (np.mean(said) - truth) / 2


def test_a_choice_that_the_shots_had_no_part_in_is_taken_at_its_word() -> None:
    random = np.random.default_rng(0)
    ways, sure = [Strategy("only", {}), Strategy("other", {})], {"only": Prior(0.9, 1e-3), "other": Prior(0.1, 1e-3)}
    held = {way.name: Held({10: guessing(random, 30, 0.5)}) for way in ways}
    found = optimism(ways, held, guessing(random, 30, 0.5), sure)
    assert found.score < 0.02 and found.gain < 0.02


@pytest.mark.parametrize("shots", [2, 3, 8])
def test_few_shots_and_an_untuned_choice(shots: int) -> None:
    """Between 0 and 1 and the same again, also where some resamples leave the backbone untuned."""
    random = np.random.default_rng(shots)
    ways = [Strategy("a", {}), Strategy("b", {}, rival="a")]
    held = {way.name: Held({0: guessing(random, shots, 0.6), 10: guessing(random, shots, 0.6)}) for way in ways}
    first, again = (optimism(ways, held, guessing(np.random.default_rng(1), shots, 0.6), {}) for _ in range(2))
    assert first == again and 0 <= first.score <= 1 and 0 <= first.gain <= 1
