"""A training that may exchange its method on the way: legs, one after another, each an ordinary trial.

Every leg is a `run_trial` on a session that has what was learned before beneath it. At each evaluation a decision is
made and written down; one for an exchange stops the leg, whose best weights are handed over. A killed training reads
its record, takes the decisions that were made as made, and goes on inside the leg where its state was saved.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from metapeft.errors import MetapeftError, Unfit
from metapeft.meta.evidence import complete
from metapeft.meta.gains import gain, room
from metapeft.peft import adapters
from metapeft.peft.base import Adapter
from metapeft.peft.prefix import Prefix as PrefixAdapter
from metapeft.peft.stack import joined, parts
from metapeft.progress import say
from metapeft.runtime import device, mx, versions
from metapeft.switching import decide, handover
from metapeft.switching.advice import Advice, Basis, plain
from metapeft.switching.decide import Decision, Evidence, Policy
from metapeft.switching.forecast import Calibration
from metapeft.switching.prices import Price
from metapeft.switching.record import Leg, Record
from metapeft.training.configuration import LEARNING_RATES, full
from metapeft.training.evaluation import evaluate, predict
from metapeft.training.session import Session
from metapeft.training.trainer import describe, evaluated, run_trial, saved_state
from metapeft.training.trial import Trial, trial_id

BASIS = "basis.json"  # beside the record, while training
METHOD = "switching"  # of the trial: it belongs to none of the five
LEAST_STEPS = 10  # a leg shorter than that is not begun
LEAST_LOOKS = 2  # of a leg, however many were made before it
FORCED = 0.5  # confidence that is asked for when the method in hand has failed
ROW = ("step", "seconds", "train_loss", "validation_loss", "validation_score", "gradient_noise")  # of a curve, kept

Progress = Callable[[dict[str, Any]], bool | None]


class _Lost(Exception):
    """The exchange changed too much at its moment."""


def identity(
    session: Session, start: dict[str, Any], steps: int, seed: int, policy: Policy, seconds: float | None = None
) -> str:
    """The id of a switched training; a static one's differs."""
    task, backbone = session.task, session.backbone.identity
    return switching_id(
        task.name, task.version, backbone, start, steps, seed, policy, len(task.train), task.metric, seconds
    )


def switching_id(
    task: str,
    version: str,
    backbone: str,
    start: dict[str, Any],
    steps: int,
    seed: int,
    policy: Policy,
    train_examples: int,
    metric: str = "",
    seconds: float | None = None,
) -> str:
    configuration: dict[str, Any] = {"method": METHOD, "start": full(start), "policy": asdict(policy)}
    if seconds is not None:
        configuration["seconds"] = seconds
    return trial_id(task, version, backbone, configuration, seed, steps, train_examples, metric=metric)


def train(
    session: Session,
    start: dict[str, Any],
    advice: Callable[[Basis | None], Advice],
    *,
    steps: int,
    folder: Path,
    policy: Policy | None = None,
    seed: int = 0,
    seconds: float | None = None,
    progress: Progress | None = None,
    test: bool = True,
) -> tuple[Trial, Record]:
    """Trains from `start` with the budget that `steps` of it cost (or `seconds`, predicted), and measures the outcome.

    folder: of the adapter in the end; legs and the record lie beside it until then, the record in the adapter's
    metadata afterwards. advice: asked for once, when there is no record yet or decisions are to be made; a training
    that goes on passes the basis of the advice that it began with. progress: as `run_trial`'s, with "leg" and "method".
    Raises MetapeftError when nothing came of it.
    """
    policy = policy or Policy()
    name = identity(session, start, steps, seed, policy, seconds)
    done = finished(folder, name)
    if done is not None:
        return done
    training = _Training(session, start, advice, steps, folder, policy, seed, seconds, progress, name)
    return training.run(test)


class _Training:
    def __init__(
        self,
        session: Session,
        start: dict[str, Any],
        advice: Callable[[Basis | None], Advice],
        steps: int,
        folder: Path,
        policy: Policy,
        seed: int,
        seconds: float | None,
        progress: Progress | None,
        name: str,
    ):
        self.session, self.policy, self.seed, self.folder = session, policy, seed, folder
        self.progress, self.name, self.budget = progress, name, steps
        self.place = _legs(folder)
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self._ask = advice
        self._advice: Advice | None = None
        found = Record.load(self.place, name)
        if found is None:
            found = self._opened(start, steps, seconds)
            found.save(self.place)
        self.record = found

    @property
    def advice(self) -> Advice:
        if self._advice is None:
            self._advice = self._ask(self._basis())
        return self._advice

    def _basis(self) -> Basis | None:
        """Of the advice that the training began with; None: it begins now, or what was kept cannot be read."""
        try:
            found = json.loads((self.place / BASIS).read_text(encoding="utf-8"))
            return Basis(int(found["version"]), tuple(found["trials"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _opened(self, start: dict[str, Any], steps: int, seconds: float | None) -> Record:
        shutil.rmtree(self.place, ignore_errors=True)
        price = self.advice.start.price
        self.place.mkdir(parents=True)
        (self.place / BASIS).write_text(json.dumps(asdict(self.advice.basis)), encoding="utf-8")  # before the record
        budget = price.seconds(steps, self.policy.looks) if seconds is None else seconds
        first = max(1, price.steps(budget, self.policy.looks))
        return Record(
            self.name,
            budget,
            asdict(self.policy),
            [{"configuration": o.configuration, "price": asdict(o.price)} for o in self.advice.others],
            asdict(self.advice.forecaster.calibration),
            [Leg(_looking(start, self.policy.looks), first, asdict(price))],
        )

    def run(self, test: bool) -> tuple[Trial, Record]:
        record = self.record
        number = 0
        while number < len(record.legs):
            leg = record.legs[number]
            if leg.trial is None and not leg.undone:
                self._leg(number)
                record.save(self.place)
            if number == len(record.legs) - 1 and not record.stopped:
                self._next(number)
                record.save(self.place)
            number += 1
        return self._finished(test), record

    def _leg(self, number: int) -> None:
        leg = self.record.legs[number]
        began = time.perf_counter()
        given = self._handover(leg)
        configuration = leg.configuration if given is None else given.configuration
        below = None if given is None else given.below
        guarded = handover.guard(self.session, leg.how)  # type: ignore[arg-type]
        old = None if leg.source is None or leg.change else self.whole(leg.source)
        before = None if old is None else handover.predicted(self.session, old, guarded)
        bare = handover.predicted(self.session, None, guarded) if old is not None and leg.how == "fresh" else None
        leg.seconds = time.perf_counter() - began
        task, backbone, seed = self.session.task, self.session.backbone.identity, self.seed + number
        own = full(configuration)
        identity = trial_id(
            task.name, task.version, backbone, own, seed, leg.steps, len(task.train), metric=task.metric
        )
        with handover.over(self.session, below) as upper:

            def prepare(adapter: Adapter) -> None:
                if leg.how == "gated":
                    assert isinstance(adapter, PrefixAdapter)
                    adapter.open_over(min(evaluated(leg.steps, configuration["evaluations"])))
                if given is None or saved_state(self._leg_folder(number), identity) is not None:
                    return  # goes on, from weights that replace these
                begun = time.perf_counter()
                if given.prepare is not None:
                    given.prepare(upper, adapter)
                if before is not None:
                    after = predict(upper, adapter, "validation", guarded) if bare is None else bare
                    found = handover.change(self.session, guarded, before, after)
                    leg.change = found.to_json()
                    if found.score_after < found.score_before - self._tolerance(leg.how, found) and not leg.returns:
                        raise _Lost
                leg.seconds += time.perf_counter() - begun
                self.record.save(self.place)

            try:
                trial = run_trial(
                    upper,
                    configuration,
                    steps=leg.steps,
                    seed=seed,
                    folder=self._leg_folder(number),
                    progress=lambda event: self._watch(number, event),
                    test=False,
                    prepare=prepare,
                )
            except _Lost:
                leg.undone = True
                return
            except Unfit as error:
                if number == 0:
                    raise
                leg.undone, leg.why = True, str(error)
                return
        leg.trial = trial.to_json()

    def _tolerance(self, how: str, found: handover.Change) -> float:
        """Where outputs stay as they are but for rounding, few examples see it: one of them may fall."""
        tolerance = self.policy.tolerance
        return max(tolerance, 1 / found.examples) if handover.exact(how) else tolerance  # type: ignore[arg-type]

    def _handover(self, leg: Leg) -> handover.Handover | None:
        if leg.source is None:
            return None
        learned = leg.how != "fresh"
        return handover.handover(self.session, self.whole(leg.source), leg.configuration, self.seed, learned)

    def whole(self, number: int) -> Adapter:
        """What a leg came to, with all that lies beneath it."""
        leg = self.record.legs[number]
        top = adapters.load(self._leg_folder(number), self.session.model)
        mx.eval(top.module.parameters())
        if leg.source is None or leg.how == "fresh":
            return top
        old = self.whole(leg.source)
        # What is beneath follows from the methods alone: the whole of it under matrices, else its matrices.
        below = old if leg.how == "frozen" else parts(old)[0]
        return top if below is None else joined(below, top, self.session.model)

    def _leg_folder(self, number: int) -> Path:
        return self.place / f"leg-{number}"

    def _watch(self, number: int, event: dict[str, Any]) -> bool:
        leg = self.record.legs[number]
        said = event | {"leg": number, "method": leg.configuration["method"]}
        if self.progress is not None and self.progress(said):
            self.record.stopped = True
            return True
        if event.get("validation_score") is None or event["step"] >= leg.steps:
            return False
        record = self.record.decided(number, event["step"])
        if record is None:
            evidence = self._evidence(
                number, [{n: row[n] for n in ROW} for row in event["curve"]], self._spent(number, event["step"])
            )
            record = decide.to_json(evidence, self.policy, decide.decide(evidence, self.policy))
            self.record.decisions.append(record)
            self.record.save(self.place)
        return decide.recorded(record).switch

    def _spent(self, number: int, step: int) -> float:
        """Of the budget, in predicted seconds, when leg `number` is at `step`."""
        total = 0.0
        for place, leg in enumerate(self.record.legs[: number + 1]):
            price = Price(**leg.price)
            if place:
                total += price.exchange(leg.how)  # type: ignore[arg-type]
            if not leg.undone:
                done = step if place == number else _reached(leg)
                total += price.seconds(done, _looked(leg, done))
        return total

    def _looks_left(self, number: int, step: int) -> int:
        """Of the training, when leg `number` is at `step`: for the leg that follows."""
        legs = self.record.legs[: number + 1]
        made = sum(_looked(leg, step if leg is legs[-1] else _reached(leg)) for leg in legs if not leg.undone)
        return max(LEAST_LOOKS, self.policy.looks - made)

    def _evidence(self, number: int, rows: list[dict[str, Any]], spent: float) -> Evidence:
        leg, forecaster = self.record.legs[number], self.advice.forecaster
        left = self.record.budget_seconds - spent
        best = max(rows, key=lambda row: (row["validation_score"], -row["validation_loss"]))["validation_score"]
        n = min(64, len(self.session.encoded["validation"]))
        error = math.sqrt(max(best * (1 - best), 0.02) / n)
        untuned = forecaster.untuned
        options = [_in_hand(leg)]
        looks = self._looks_left(number, rows[-1]["step"])
        options += self._options(number, leg.configuration["method"], left, looks, learned=best > untuned + error)
        chosen = [(complete(plain(o["configuration"])), o["steps"]) for o in options]
        ahead = forecaster.ahead(rows, leg.steps)
        calibration = Calibration(**self.record.calibration)
        told = forecaster.before(chosen).given(*ahead, calibration.caution).wider(calibration.width)
        return Evidence(
            leg=number,
            step=rows[-1]["step"],
            steps=leg.steps,
            seconds_left=left,
            curve=tuple(rows),
            untuned=untuned,
            in_hand=(gain(best, untuned), error / room(untuned)),
            extrapolated=ahead,
            options=tuple(options),
            mean=tuple(told.mean.tolist()),
            covariance=tuple(tuple(row) for row in told.covariance.tolist()),
            switches=self.record.switches(),
        )

    def _options(
        self, number: int, method: str | None, left: float, looks: int, learned: bool = True
    ) -> list[dict[str, Any]]:
        """What the seconds left would buy of each alternative. method: in hand; None: nothing is. looks: at it.
        learned: whether it is better than the backbone."""
        tokens = self._tokens(number, method)
        tried = [plain(leg.configuration) for leg in self.record.legs]
        found = []
        for place, alternative in enumerate(self.record.alternatives):
            configuration, price = alternative["configuration"], Price(**alternative["price"])
            way = handover.how(tokens, configuration["method"], learned) if method else "frozen"
            cost = price.exchange(way) if method else 0.0
            steps = price.steps(left - cost, looks)
            if steps >= LEAST_STEPS and plain(configuration) not in tried:
                option = {"configuration": configuration, "steps": steps, "cost": cost, "alternative": place}
                found.append(option | {"how": way if method else ""})
        return found

    def _tokens(self, number: int, method: str | None) -> handover.Tokens:
        if method in ("prompt", "p_tuning"):
            return "embeddings"
        if method == "prefix":
            return "keys"
        leg = self.record.legs[number]
        if leg.source is None or leg.how != "frozen":
            return "none"
        source = self.record.legs[leg.source]
        return "none" if self._tokens(leg.source, source.configuration["method"]) == "none" else "keys"

    def _next(self, number: int) -> None:
        """Adds the leg that follows the last one, if one does."""
        leg = self.record.legs[number]
        if leg.undone:
            self._resumed(number)
            return
        assert leg.trial is not None
        if leg.trial["status"] not in ("ok", "stopped"):
            self._forced(number)
            return
        last = [d for d in self.record.decisions if d["evidence"]["leg"] == number]
        decision = decide.recorded(last[-1]) if last else Decision(0, "")
        if decision.switch:
            option = last[-1]["evidence"]["options"][decision.to]
            self._begin(option, source=number)
            methods = f"{leg.configuration['method']} to {option['configuration']['method']}"
            say(f"exchange: from {methods} ({option['how']}): {decision.why}")

    def _begin(self, option: dict[str, Any], source: int | None, forced: bool = False) -> None:
        price = self.record.alternatives[option["alternative"]]["price"]
        last = len(self.record.legs) - 1
        looks = self._looks_left(last, _reached(self.record.legs[last]))
        configuration = _looking(option["configuration"], looks)
        self.record.legs.append(Leg(configuration, option["steps"], price, option["how"], source, forced))

    def _resumed(self, number: int) -> None:
        """After an exchange that was undone: the method in hand goes on, on top of what it learned."""
        undone = self.record.legs[number]
        source = undone.source
        if source is None:
            return  # it was forced: there is nothing to go on with
        leg = self.record.legs[source]
        configuration, looks = leg.configuration, self._looks_left(number, 0)
        if configuration["method"] == "p_tuning":  # its encoder is gone; its tokens are a prompt
            configuration = {"method": "prompt", "learning_rate": LEARNING_RATES["prompt"]}
        price = Price(**leg.price)
        how = handover.how(self._tokens(source, leg.configuration["method"]), configuration["method"])
        left = self.record.budget_seconds - self._spent(number, 0)
        steps = price.steps(left - price.exchange(how), looks)
        goes_on = steps >= LEAST_STEPS
        then = f"{leg.configuration['method']} goes on where it was" if goes_on else "there is no time to go on"
        say(f"exchange undone: {undone.why or 'it changed too much'}; {then}")
        if goes_on:
            configuration = _looking(configuration, looks)
            self.record.legs.append(Leg(configuration, steps, leg.price, how, source, returns=True))

    def _forced(self, number: int) -> None:
        """After a leg that failed: the best alternative, if the seconds left buy any."""
        leg = self.record.legs[number]
        if self.record.decided(number, leg.steps) is not None:
            return  # decided before a kill, against all of them: an exchange would have added its leg
        spent = self._spent(number, _reached(leg))
        left = self.record.budget_seconds - spent
        source = leg.source
        method = None if source is None else self.record.legs[source].configuration["method"]
        looks = self._looks_left(number, _reached(leg))
        options = self._options(number if source is None else source, method, left, looks)
        if not options or self.record.switches() >= self.policy.most:
            return
        forecaster = self.advice.forecaster
        told = forecaster.before([(complete(o["configuration"]), o["steps"]) for o in options])
        told = told.wider(self.record.calibration["width"])
        before = 0.0 if source is None else self._validated(source)
        n = len(options)
        covariance = [[0.0] * (n + 1), *([0.0, *row] for row in told.covariance.tolist())]
        row = {"step": _reached(leg), "seconds": None, "train_loss": None, "validation_loss": None}
        evidence = Evidence(
            leg=number,
            step=leg.steps,
            steps=leg.steps,
            seconds_left=left,
            curve=(row | {"validation_score": None, "gradient_noise": None},),
            untuned=forecaster.untuned,
            in_hand=(before, 0.0),
            extrapolated=(before, 0.0),
            options=(_in_hand(leg), *options),
            mean=(before, *told.mean.tolist()),
            covariance=tuple(tuple(r) for r in covariance),
            switches=self.record.switches(),
        )
        policy = replace(self.policy, confidence=min(FORCED, self.policy.confidence))
        decision = decide.decide(evidence, policy)
        self.record.decisions.append(decide.to_json(evidence, policy, decision))
        if decision.switch:
            self._begin(evidence.options[decision.to], source=source, forced=True)

    def _validated(self, number: int) -> float:
        trial = self.record.legs[number].trial
        assert trial is not None
        return gain(trial["validation"]["value"], self.advice.forecaster.untuned)

    def _finished(self, test: bool) -> Trial:
        """The outcome: the last leg, unless it ended lower than an earlier one by more than is tolerated."""
        record = self.record
        usable = [n for n, leg in enumerate(record.legs) if leg.trial and leg.trial["status"] in ("ok", "stopped")]
        if not usable:
            first = record.legs[0].trial
            why = f"{first['status']} ({first['error']})" if first else "nothing"
            raise MetapeftError(f"training ended as {why} and no seconds were left for another method")
        scores = {n: record.legs[n].trial["validation"]["value"] for n in usable}  # type: ignore[index]
        best = max(usable, key=lambda n: (scores[n], n))
        last = usable[-1]
        record.back = scores[last] < scores[best] - self.policy.tolerance
        record.kept = best if record.back else last
        if record.back:
            kept, given_up = (record.legs[n].configuration["method"] for n in (best, last))
            say(f"exchange taken back: {given_up} ended at {scores[last]:.3f}, {kept} had {scores[best]:.3f}")
        trial = self._outcome(record.kept)
        adapter = self.whole(record.kept)
        adapter.attach(self.session.model)
        try:
            began = time.perf_counter()
            if test:
                trial.score = evaluate(self.session, adapter, "test")
            trial.seconds += time.perf_counter() - began
        finally:
            adapter.detach(self.session.model)
        trial.adapter = str(self.folder)
        adapters.save(adapter, self.folder, describe(trial, self.session.task) | {"switching": record.to_json()})
        trial.adapter_bytes = _bytes(self.folder)
        shutil.rmtree(self.place, ignore_errors=True)
        return trial

    def _outcome(self, kept: int) -> Trial:
        record = self.record
        legs = [(leg, Trial.from_json(leg.trial)) for leg in record.legs if leg.trial]
        curve: list[dict[str, Any]] = []
        step, seconds = 0, 0.0
        for number, leg in enumerate(record.legs):
            seconds += leg.seconds
            if not leg.trial:
                continue
            for row in leg.trial["curve"]:
                moved = {"step": step + row["step"], "seconds": round(seconds + row["seconds"], 3)}
                curve.append(row | moved | {"leg": number})
            step += _reached(leg)
            seconds += leg.trial["seconds"]
        trial = record.legs[kept].trial
        assert trial is not None
        task = self.session.task
        start = record.legs[0].configuration
        return Trial(
            id=self.name,
            task=task.name,
            task_version=task.version,
            backbone=self.session.backbone.id,
            method=METHOD,
            configuration={"method": METHOD, "start": start, "policy": record.policy},
            seed=self.seed,
            budget=self.budget,
            status="stopped" if record.stopped else "ok",
            validation=Trial.from_json(trial).validation,
            untuned_score=self.session.untuned.get("test"),
            curve=curve,
            seconds=sum(t.seconds for _, t in legs) + sum(leg.seconds for leg in record.legs),
            train_seconds=sum(t.train_seconds for _, t in legs) + sum(leg.seconds for leg in record.legs),
            cpu_seconds=sum(t.cpu_seconds for _, t in legs),
            tokens=sum(t.tokens for _, t in legs),
            peak_memory_mb=max(t.peak_memory_mb for _, t in legs),
            trained_parameters=trial["trained_parameters"],
            device=device(),
            versions=versions(),
            started=self.started,
            train_examples=len(task.train),
        )


def _in_hand(leg: Leg) -> dict[str, Any]:
    """A leg as an option: to go on with it."""
    return {"configuration": leg.configuration, "steps": leg.steps, "cost": 0.0, "how": "", "alternative": -1}


def _looking(configuration: dict[str, Any], looks: int) -> dict[str, Any]:
    return full(configuration | {"evaluations": looks})


def _looked(leg: Leg, step: int) -> int:
    """How often a leg was looked at when it is at `step`."""
    return sum(at <= step for at in evaluated(leg.steps, leg.configuration["evaluations"]))


def _reached(leg: Leg) -> int:
    """Steps that a leg that is over has done, as far as its curve tells."""
    return int(leg.trial["curve"][-1]["step"]) if leg.trial and leg.trial["curve"] else 0


def _legs(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.legs")


def _bytes(folder: Path) -> int:
    return sum(os.path.getsize(p) for p in folder.glob("*adapter_model.safetensors"))


def finished(folder: Path, name: str) -> tuple[Trial, Record] | None:
    """What `train` left in `folder`, if it ended."""
    from metapeft.errors import UserError
    from metapeft.peft import checkpoints

    try:
        metadata = checkpoints.read(folder).metadata
        trial, record = Trial.from_json(metadata["trial"]), Record.from_json(metadata["switching"])
    except (UserError, KeyError, TypeError, ValueError):
        return None
    if trial.id != name:
        return None
    trial.adapter_bytes = _bytes(folder)
    shutil.rmtree(_legs(folder), ignore_errors=True)  # a kill may have left them
    return trial, record
