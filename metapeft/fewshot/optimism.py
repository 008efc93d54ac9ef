"""How much too good the held-out answers of a choice look because the choice was made by them.

Every shot is answered by adapters that have not seen it, but the strategy and its steps are those of many that answered
these very shots best. The bootstrap says what that is worth (Efron 1983, doi:10.1080/01621459.1983.10477973): choose
again on shots drawn with replacement, and compare the new choice's answers to the drawn shots with its answers to all.
Nothing is trained for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from metapeft.fewshot.choose import UNKNOWN, Choice, Held, Prior, Strategy, chance, choose
from metapeft.fewshot.measure import Answers

RESAMPLES = 100


def optimism(
    strategies: Sequence[Strategy], held: Mapping[str, Held], untuned: Answers, priors: Mapping[str, Prior]
) -> float:
    """In hits, a share between 0 and 1; subtract it from the chosen strategy's. The arguments are those of `choose`;
    every strategy in `held` must have answered all shots. Seeded: the same answers give the same."""
    count = len(untuned.hit)
    random = np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLES):
        drawn = random.integers(0, count, count)
        again = {name: Held({s: taken(a, drawn) for s, a in each.answers.items()}) for name, each in held.items()}
        chosen = choose(strategies, again, taken(untuned, drawn), priors).chosen
        hit = (untuned if chosen is None else held[chosen.strategy].answers[chosen.steps]).hit
        found.append(hit[drawn].mean() - hit.mean())
    return max(0.0, float(np.mean(found)))


def corrected(choice: Choice, too_good: float, priors: Mapping[str, Prior]) -> Choice:
    """The choice, expected to gain what its evidence less `too_good` lets expect, beside the same prior; that may be
    nothing. What was weighed beside it stays as it is."""
    chosen = choice.chosen
    if chosen is None or not chosen.measured:
        return choice
    weight = 1 - (chosen.deviation / priors.get(chosen.strategy, UNKNOWN).deviation) ** 2  # of the evidence
    gain = chosen.gain - weight * too_good
    less = replace(chosen, gain=gain, p_better=chance(gain, chosen.deviation))
    judged = tuple(less if each is chosen else each for each in choice.judged)
    return replace(choice, chosen=less if gain > 0 else None, judged=judged)


def taken(found: Answers, rows: np.ndarray) -> Answers:
    """Of these examples."""
    return Answers(found.hit[rows], found.right[rows], found.loss[rows])
