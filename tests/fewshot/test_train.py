"""Training on shots starts where it is told to, looks where it is told to, and is another trial for another start."""

from __future__ import annotations

import numpy as np
import pytest

from metapeft.errors import UserError
from metapeft.fewshot.choose import AT, Strategy, fitted
from metapeft.fewshot.measure import Answers
from metapeft.fewshot.train import digest, train
from metapeft.peft import adapters
from metapeft.peft.base import Adapter
from metapeft.peft.saved import Saved
from metapeft.training.evaluation import predict
from metapeft.training.session import Session
from metapeft.training.trainer import run_trial
from metapeft.training.trial import trial_id
from tests.training import made

CONFIGURATIONS = {
    "lora": {"method": "lora", "rank": 2, "layers": 2, "learning_rate": 1e-2},
    "prefix": {"method": "prefix", "tokens": 3, "learning_rate": 1e-2},
    "prompt": {"method": "prompt", "tokens": 3, "learning_rate": 1e-2},
}


@pytest.fixture(scope="module")
def at() -> Session:
    return made.session()


def trained(at: Session, method: str, where: list[int], start: Saved | None = None) -> tuple[dict[int, Saved], dict]:
    kept, losses = {}, {}

    def watch(step: int, adapter: Adapter) -> None:
        kept[step] = adapters.take(adapter, {})
        losses[step] = predict(at, adapter, "test").loss_sum.mean()

    trial = train(at, CONFIGURATIONS[method], watch, steps=6, at=where, start=start)
    assert trial.status in ("ok", "stopped") and trial.score is None
    return kept, losses


@pytest.mark.parametrize("method", CONFIGURATIONS)
def test_it_goes_on_from_a_start(at: Session, method: str) -> None:
    kept, losses = trained(at, method, [0, 2, 6])
    assert list(kept) == [0, 2, 6]
    again, same = trained(at, method, [0, 2], start=kept[6])
    assert digest(again[0]) == digest(kept[6]) and same[0] == pytest.approx(losses[6], rel=1e-5)
    assert digest(again[2]) != digest(kept[6])
    fresh, _ = trained(at, method, [0, 2])
    assert digest(fresh[0]) == digest(kept[0]) and digest(fresh[2]) == digest(kept[2]), "the same steps, the same end"


def test_what_is_validated_at_a_step_is_what_a_training_until_there_leaves(at: Session) -> None:
    way = Strategy("cold lora", CONFIGURATIONS["lora"])
    seen: dict[int, str] = {}
    nothing = Answers(np.zeros(1), np.zeros(1), np.zeros(1))

    def keep(step: int, adapter: Adapter) -> None:
        seen[step] = digest(adapters.take(adapter, {}))

    everything = range(len(at.encoded["train"]))
    fitted(way, at, everything, AT, lambda s, a: nothing, keep)
    validated = dict(seen)
    for step in AT[:2]:
        fitted(way, at, everything, [step], lambda s, a: nothing, keep)
        assert seen[step] == validated[step]


def test_the_end_of_the_schedule_is_that_of_an_ordinary_trial(at: Session, tmp_path: object) -> None:
    kept, _ = trained(at, "lora", [6])
    configuration = CONFIGURATIONS["lora"] | {"evaluations": 1}
    ends: list[Saved] = []
    held: list[Adapter] = []

    def last(event: dict[str, int]) -> None:
        if event["step"] == 6:
            ends.append(adapters.take(held[0], {}))

    run_trial(at, configuration, steps=6, test=False, prepare=held.append, progress=last)
    for name, value in kept[6].tensors.items():
        np.testing.assert_array_equal(np.array(value), np.array(ends[0].tensors[name]))


def test_another_start_is_another_trial(at: Session) -> None:
    configuration = CONFIGURATIONS["lora"]
    plain = trial_id("t", "v", "b", configuration, 0, 6, 10)
    assert plain == trial_id("t", "v", "b", configuration, 0, 6, 10, "")
    assert plain == trial_id("t", "v", "b", configuration, 0, 6, 10, metric="accuracy")
    assert plain != trial_id("t", "v", "b", configuration, 0, 6, 10, metric="macro_f1"), "it chooses the weights"
    kept, _ = trained(at, "lora", [2, 6])
    trials = [train(at, configuration, lambda *_: None, steps=2, at=[2], start=s) for s in (None, kept[2], kept[6])]
    assert len({t.id for t in trials}) == 3
    assert train(at, configuration, lambda *_: None, steps=2, at=[2], start=kept[6]).id == trials[2].id


def test_a_start_for_another_backbone_is_refused(at: Session) -> None:
    kept, _ = trained(at, "prompt", [2])
    wide = Saved(kept[2].config, {"prompt_embeddings": kept[2].tensors["prompt_embeddings"][:, :32]})
    with pytest.raises(UserError, match="another backbone"):
        train(at, CONFIGURATIONS["prompt"], lambda *_: None, steps=2, at=[2], start=wide)
