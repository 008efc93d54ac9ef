"""How much too good the held-out answers of a choice look because the choice was made by them.

Every shot is answered by adapters that have not seen it, but the strategy and its steps are those of many that answered
these very shots best. The bootstrap says what that is worth (Efron 1983, doi:10.1080/01621459.1983.10477973): choose
again on shots drawn with replacement, and compare the new choice's answers to the drawn shots with its answers to all.
Nothing is trained for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from metapeft.fewshot.choose import Held, Prior, Strategy, choose, merit
from metapeft.fewshot.measure import Answers

RESAMPLES = 100


@dataclass(frozen=True)
class Optimism:
    """score: of the hits of what is chosen. gain: of its difference from the untuned backbone, as strategies are
    compared (`choose.merit`). Both are shares between 0 and 1."""

    score: float
    gain: float


def optimism(
    strategies: Sequence[Strategy], held: Mapping[str, Held], untuned: Answers, priors: Mapping[str, Prior]
) -> Optimism:
    """The arguments are those of `choose`; every strategy in `held` must have answered all shots. Seeded: the same
    answers give the same."""
    count = len(untuned.hit)
    random = np.random.default_rng(0)
    scores, gains = [], []
    for _ in range(RESAMPLES):
        drawn = random.integers(0, count, count)
        again = {name: Held({s: taken(a, drawn) for s, a in each.answers.items()}) for name, each in held.items()}
        chosen = choose(strategies, again, taken(untuned, drawn), priors).chosen
        answers = untuned if chosen is None else held[chosen.strategy].answers[chosen.steps]
        ahead = merit(answers) - merit(untuned)
        scores.append(answers.hit[drawn].mean() - answers.hit.mean())
        gains.append(ahead[drawn].mean() - ahead.mean())
    return Optimism(max(0.0, float(np.mean(scores))), max(0.0, float(np.mean(gains))))


def taken(found: Answers, rows: np.ndarray) -> Answers:
    """Of these examples."""
    return Answers(found.hit[rows], found.right[rows], found.loss[rows])
