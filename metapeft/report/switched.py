"""A training that could exchange its method, as a picture: its curve, the forecasts on the way, and the decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from metapeft.report import wording
from metapeft.report.charts import Axis, figure, frame, score_axis, stroke, untuned_line, write


@dataclass(frozen=True)
class Point:
    """A decision, at a step of the whole training. low, high: the forecast of the final score if the method went on."""

    step: int
    score: float
    low: float
    high: float
    taken: str  # the method that was changed to, or ""
    why: str


@dataclass(frozen=True)
class Part:
    """A leg: its method, steps and scores on validation, and the decisions made in it."""

    method: str
    how: str
    curve: tuple[tuple[int, float], ...]
    points: tuple[Point, ...]


def parts(record: Mapping[str, Any]) -> list[Part]:
    """Of a record as in switching.json. Legs that were never trained are left out."""
    found, start = [], 0
    for number, leg in enumerate(record["legs"]):
        trial = leg["trial"]
        if not trial or not trial["curve"]:
            continue
        points = []
        for decision in record["decisions"]:
            evidence, outcome = decision["evidence"], decision["decision"]
            score = evidence["curve"][-1]["validation_score"]
            if evidence["leg"] == number and score is not None and outcome["expected"]:
                going = outcome["expected"][0]
                taken = evidence["options"][outcome["to"]]["configuration"]["method"] if outcome["to"] else ""
                at = start + evidence["step"]
                points.append(Point(at, score, going["low"], going["high"], taken, outcome["why"]))
        curve = tuple((start + row["step"], row["validation_score"]) for row in trial["curve"])
        found.append(Part(leg["configuration"]["method"], leg["how"], curve, tuple(points)))
        start += trial["curve"][-1]["step"]
    return found


def chart(record: Mapping[str, Any], width: int, untuned: float | None = None) -> str:
    """Validation score over optimizer steps; the band is the 90 % interval of the final score as it was forecast there.

    A ring is a decision to go on, a dot one to change; "" without any curve.
    """
    legs = parts(record)
    if not legs:
        return ""
    height = 300
    left, right, top, bottom = 52.0, width - 16.0, 22.0, height - 46.0
    values = [v for leg in legs for _, v in leg.curve]
    values += [v for leg in legs for p in leg.points for v in (p.low, p.high)]
    x = Axis(0, max(s for leg in legs for s, _ in leg.curve) * 1.02, left, right)
    y = score_axis([*values, *([untuned] if untuned is not None else [])], bottom, top)
    body = frame(x, y, left, right, top, bottom, "optimizer steps", wording.number, wording.score)
    body += untuned_line(y, untuned, left, right)
    for number, leg in enumerate(legs):
        kind = f"m-{escape(leg.method)}"
        body.append(_band(leg.points, x, y, kind))
        path = "M" + "L".join(f"{x(s):.1f} {y(v):.1f}" for s, v in leg.curve)
        body.append(f'<g class="line best {kind}"><path d="{path}"/></g>')
        if number:
            place = x(legs[number - 1].curve[-1][0])
            body.append(stroke("untuned", f"M{place:.1f} {top}V{bottom}"))
            body.append(write("note", place + 4, top - 6, f"{wording.method(leg.method)}, {leg.how or 'fresh'}"))
        for point in leg.points:
            tip = f"step {point.step}: {point.why}\nforecast {wording.score(point.low)} to {wording.score(point.high)}"
            fill = "currentColor" if point.taken else "var(--page, Canvas)"
            body.append(
                f'<g class="mark {kind}" tabindex="0" data-tip="{escape(tip)}">'
                f'<circle cx="{x(point.step):.1f}" cy="{y(point.score):.1f}" r="{6 if point.taken else 4}"'
                f' style="fill:{fill};stroke:currentColor;stroke-width:2"/></g>'
            )
    return figure(width, height, "Score while the method could be exchanged, with forecasts and decisions", body)


def _band(points: Sequence[Point], x: Axis, y: Axis, kind: str) -> str:
    if not points:
        return ""
    if len(points) == 1:
        only = points[0]
        moves = f"M{x(only.step):.1f} {y(only.low):.1f}V{y(only.high):.1f}"
        return f'<g class="{kind}"><path d="{moves}" style="stroke:currentColor;stroke-width:6;opacity:.2"/></g>'
    upper = [f"{x(p.step):.1f} {y(p.high):.1f}" for p in points]
    lower = [f"{x(p.step):.1f} {y(p.low):.1f}" for p in reversed(points)]
    moves = "M" + "L".join([*upper, *lower]) + "Z"
    return f'<g class="{kind}"><path d="{moves}" style="fill:currentColor;stroke:none;opacity:.16"/></g>'


def rows(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """One per decision, for a table."""
    return [
        {
            "step": str(point.step),
            "key": leg.method,
            "method": wording.method(leg.method),
            "score": wording.score(point.score),
            "forecast": f"{wording.score(point.low)} to {wording.score(point.high)}",
            "decision": f"change to {wording.method(point.taken)}" if point.taken else "go on",
            "why": point.why,
        }
        for leg in parts(record)
        for point in leg.points
    ]


def sentence(record: Mapping[str, Any]) -> str:
    """What happened, in a sentence or two."""
    legs = [leg for leg in record["legs"] if not leg["undone"]]
    methods = [wording.method(leg["configuration"]["method"]) for leg in legs]
    text = f"Training began with {methods[0]}"
    text += f" and changed to {', then '.join(methods[1:])}." if len(methods) > 1 else " and never changed its method."
    undone = sum(leg["undone"] for leg in record["legs"])
    if undone:
        text += f" {undone} exchange{'s were' if undone > 1 else ' was'} undone: the guard set lost too much."
    if record.get("back"):
        text += (
            f" The adapter kept is that of {wording.method(record['legs'][record['kept']]['configuration']['method'])}."
        )
    changes = [leg["change"] for leg in legs if leg["change"]]
    if changes:
        worst = max(c["largest"] for c in changes)
        text += f" No guarded example's loss moved by more than {worst:.2g} nats per token at the change."
    return text
