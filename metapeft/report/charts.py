"""Pictures of trials as inline SVG. Text and colours come from the page's style sheet, so they follow light and dark.

Every chart takes its width in pixels and is drawn for it: a page shows the narrow one on a phone instead of shrinking
the wide one until nobody can read it. Marks carry `data-tip`, lines of text for the page's hover.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from metapeft.report import wording
from metapeft.search import pareto
from metapeft.training.trial import Trial

TINY_LOSS = 1e-4  # losses below are drawn here: their logarithm has no bottom
CHARACTER = 6.7  # mean width of a letter at 12 px


@dataclass(frozen=True)
class Axis:
    """Data -> pixels, with tick marks. `start` and `end` are pixels; `log` for quantities that differ by factors."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        a, b, x = (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (self.end - self.start) * (x - a) / (b - a)

    def ticks(self, wanted: int) -> list[float]:
        if self.log:
            decades = range(math.floor(math.log10(self.low)) - 1, math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
                found = [s * 10.0**d for d in decades for s in steps if self.low <= s * 10.0**d <= self.high]
                if len(found) <= wanted + 1:
                    break
            if len(found) >= 2:
                return found[:: math.ceil(len(found) / (wanted + 1))]
        raw = (self.high - self.low) / max(wanted, 1)
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(s * unit for s in (1, 2, 2.5, 5, 10) if s * unit >= raw * 0.7)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis(values: Iterable[float], start: float, end: float, *, log: bool = False, margin: float = 0.06) -> Axis:
    """An axis that holds all values, with some room around them."""
    known = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
    low, high = min(known), max(known)
    if log:
        room = max((high / low) ** margin, 1.05)
        return Axis(low / room, high * room, start, end, log=True)
    room = max((high - low) * margin, 1e-3 * max(abs(high), 1e-3))
    return Axis(low - room, high + room, start, end)


def trade_offs(trials: Sequence[Trial], width: int, untuned: float | None = None, adapters: bool = False) -> str:
    """Score against training seconds; size is memory, colour the method; the front is filled and joined.

    Trials without a result are left out; repeats of a configuration are one dot, their mean. The line joins what is
    best in score and seconds alone; a filled point beside it is on the front for its memory.
    """
    trials = pareto.averaged(trials)
    points = {t.id: p for t in trials if (p := pareto.objectives(t)) is not None}
    shown = [t for t in trials if t.id in points]
    if not shown:
        return ""
    height = 380 if width > 500 else 330
    left, right, top, bottom = 52.0, width - 16.0, 14.0, height - 46.0
    spans = {t.id: span(t) for t in shown}
    x = axis((points[t.id][1] for t in shown), left + 14, right - 14, log=True)
    y = score_axis([*(v for s in spans.values() for v in s), *([untuned] if untuned is not None else [])], bottom, top)
    memories = [points[t.id][2] for t in shown]
    best = pareto.front(shown, adapters)
    on_front = {t.id for t in best}
    titles = pareto.titles(best, adapters)

    body = frame(x, y, left, right, top, bottom, "training time", wording.duration, wording.score)
    body += untuned_line(y, untuned, left, right)
    body.append(_staircase([points[t.id] for t in best], x, y))
    obstacles: list[Box] = []
    for trial in sorted(shown, key=lambda t: (t.id in on_front, -points[t.id][2])):
        score, seconds, memory = points[trial.id]
        cx, cy, r = x(seconds), y(score), radius(memory, memories)
        obstacles.append(Box(cx - r, cy - r, cx + r, cy + r))
        kind = f"{'front' if trial.id in on_front else 'beaten'} m-{escape(trial.method)}"
        low, high = spans[trial.id]
        body.append(
            f'<g class="mark {kind}" tabindex="0" {hover(trial, titles.get(trial.id, ""))}>'
            + stroke("whisker", f"M{cx:.1f} {y(low):.1f}V{y(high):.1f}")
            + f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{r:.1f}"/></g>'
        )
    for identity, text in titles.items():
        score, seconds, memory = points[identity]
        placed = _place(text, x(seconds), y(score), radius(memory, memories), Box(left, top, right, bottom), obstacles)
        obstacles.append(placed.box)
        body.append(write("label", placed.x, placed.y, text))
    return figure(width, height, "Score against training time of every trial", body)


def curves(trials: Sequence[Trial], width: int, quantity: str, untuned: float | None = None, best: str = "") -> str:
    """Validation score or loss over optimizer steps, one line per trial; `best` is the id of the one to emphasise.

    quantity: "validation_score" or "validation_loss".
    """
    lines = learned(trials, quantity)
    if not lines:
        return ""
    height = 280
    left, right, top, bottom = 52.0, width - 16.0, 12.0, height - 46.0
    values = [v for _, known in lines for _, v in known]
    x = Axis(0, max(s for _, known in lines for s, _ in known) * 1.02, left, right)
    said: Callable[[float], str]
    if quantity == "validation_score":
        y = score_axis([*values, *([untuned] if untuned is not None else [])], bottom, top)
        said, label = wording.score, "validation score"
    else:
        y = axis((max(v, TINY_LOSS) for v in values), bottom, top, log=True)
        said, label = wording.number, "validation loss"
    body = frame(x, y, left, right, top, bottom, "optimizer steps", wording.number, said)
    if quantity == "validation_score":
        body += untuned_line(y, untuned, left, right)
    inside = f'x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"'
    body.append(
        f'<clipPath id="{quantity}-{width}"><rect {inside}/></clipPath><g clip-path="url(#{quantity}-{width})">'
    )
    for trial, known in sorted(lines, key=lambda line: line[0].id == best):
        places = [(x(s), y(v if quantity == "validation_score" else max(v, TINY_LOSS))) for s, v in known]
        path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in places)
        kind = "best" if trial.id == best else ("usual" if trial.status == "ok" else "broken")
        r = 3.4 if trial.id == best else 2.6
        body.append(
            f'<g class="mark line {kind} m-{escape(trial.method)}" tabindex="0" {hover(trial, "")}>'
            f'<path class="reach" d="{path}"/><path d="{path}"/>'
            + "".join(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{r}"/>' for px, py in places)
            + "</g>"
        )
    body.append("</g>")
    return figure(width, height, f"{label} over optimizer steps, one line per trial", body)


def growth(times: Sequence[float], shares: Sequence[float], width: int) -> str:
    """Hypervolume (`pareto.progress`) over the time that the trials took together, as steps; "" for fewer than two."""
    if len(shares) < 2 or not max(shares) > 0:
        return ""
    height = 240
    left, right, top, bottom = 52.0, width - 16.0, 12.0, height - 46.0
    x = Axis(0, times[-1] * 1.02, left, right)
    y = axis([0.0, *shares], bottom, top)
    body = frame(x, y, left, right, top, bottom, "time of all trials together", wording.duration, wording.score)
    moves = f"M{x(0):.1f} {y(0):.1f}" + "".join(f"H{x(t):.1f}V{y(s):.1f}" for t, s in zip(times, shares, strict=True))
    body.append(f'<g class="line best">{stroke("grown", moves + f"H{right}")}</g>')
    return figure(width, height, "Hypervolume of the front over time", body)


def shares(rows: Sequence[tuple[str, float, str, str]], width: int) -> str:
    """Horizontal bars of shares: (name, share, class, note); "" for none."""
    if not rows:
        return ""
    height, left, right = 40 * len(rows) + 8, 6.0, width - 8.0
    x = Axis(0, max(0.01, *(share for _, share, _, _ in rows)), left, right)
    body: list[str] = []
    for index, (name, share, kind, note) in enumerate(rows):
        y = 40.0 * index
        body.append(write("name", left, y + 14, name))
        body.append(
            write("tick", right, y + 14, f"{wording.score(share, 0)}{f', best: {note}' if note else ''}", "end")
        )
        place = f'x="{left}" y="{y + 20:.0f}" width="{max(x(share) - left, 1):.1f}" height="10"'
        body.append(f'<rect class="bar share {escape(kind)}" {place} rx="3"/>')
    return figure(width, height, "What explains the scores: " + ", ".join(f"{n} {s:.0%}" for n, s, _, _ in rows), body)


Line = tuple[Trial, list[tuple[int, float]]]


def learned(trials: Sequence[Trial], quantity: str) -> list[Line]:
    """(trial, [(step, value), …]) of what makes a curve: at least two measurements, or a trial that ended well."""
    lines = []
    for trial in trials:
        known = [(row["step"], row[quantity]) for row in trial.curve if row.get(quantity) is not None]
        known = [(step, value) for step, value in known if math.isfinite(value)]
        if len(known) > 1 or (known and trial.status == "ok"):
            lines.append((trial, known))
    return lines


def interval(mean: float, low: float, high: float, scale: tuple[float, float], width: int = 150) -> str:
    """A score with its interval on a scale that all rows share."""
    x = Axis(scale[0], scale[1], 6, width - 6)
    a, b, c = (min(max(x(v), 0), width) for v in (low, high, mean))
    body = [
        stroke("track", f"M6 9H{width - 6}"),
        stroke("bar", f"M{a:.1f} 9H{b:.1f}"),
        f'<circle class="mean" cx="{c:.1f}" cy="9" r="4.5"/>',
    ]
    text = f"{wording.score(mean)}, between {wording.score(low)} and {wording.score(high)}"
    return figure(width, 18, text, body, fluid=False)


def comparison(rows: Sequence[tuple[str, float, float, str]], width: int) -> str:
    """Horizontal bars from 0 to 100 %: (name, score, standard error, class), with the error as a whisker."""
    height = 54 * len(rows) + 22
    left, right = 6.0, width - 8.0
    x = Axis(0, 1, left, right)
    body: list[str] = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        body.append(stroke("grid", f"M{x(tick):.1f} 2V{height - 20}"))
        anchor = "start" if tick == 0 else "end" if tick == 1 else "middle"
        body.append(write("tick", x(tick), height - 5, wording.score(tick, 0), anchor))
    for index, (name, value, error, kind) in enumerate(rows):
        y = 54.0 * index
        value = min(max(value, 0.0), 1.0)
        body.append(write("name", left, y + 16, name))
        body.append(write("value", right, y + 16, wording.plus_minus(value, error), "end"))
        place = f'x="{left}" y="{y + 24:.0f}" width="{max(x(value) - left, 1):.1f}" height="18"'
        body.append(f'<rect class="bar {kind}" {place} rx="3"/>')
        error = error if math.isfinite(error) else 0.0
        a, b = x(max(value - error, 0)), x(min(value + error, 1))
        body.append(stroke("error", f"M{a:.1f} {y + 33:.0f}H{b:.1f}M{a:.1f} {y + 28:.0f}v10M{b:.1f} {y + 28:.0f}v10"))
    return figure(width, height, "Scores: " + ", ".join(f"{n} {wording.score(v)}" for n, v, _, _ in rows), body)


@dataclass(frozen=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


@dataclass(frozen=True)
class Placed:
    x: float
    y: float
    box: Box


def _place(text: str, cx: float, cy: float, radius: float, frame: Box, obstacles: Sequence[Box]) -> Placed:
    """Where a label beside a point overlaps least: tried right, left, above and below, near and then farther."""
    wide, tall = CHARACTER * len(text), 14.0
    tried: list[tuple[int, int, Placed]] = []
    for gap in (5.0, 16.0, 30.0):
        reach = radius + gap
        beside, centred = ((reach, 4.0), (-reach - wide, 4.0)), ((-wide / 2, -reach), (-wide / 2, reach + 9))
        corners = [(dx, dy) for dx in (reach, -reach - wide) for dy in (-reach, reach)]
        for dx, dy in (*beside, *centred, *corners):
            x = min(max(cx + dx, frame.left + 3), frame.right - wide - 3)
            y = min(max(cy + dy, frame.top + tall), frame.bottom - 4)
            box = Box(x, y - 11, x + wide, y + 3)
            tried.append((sum(box.meets(other) for other in obstacles), len(tried), Placed(x, y, box)))
    return min(tried, key=lambda item: item[:2])[2]


def radius(memory: float, memories: Sequence[float]) -> float:
    """Of a dot in pixels: its area grows with memory."""
    low, high = min(memories), max(memories)
    share = (memory - low) / (high - low) if high > low else 0.3
    return math.sqrt(25 + 120 * share)


def span(trial: Trial) -> tuple[float, float]:
    """A trial's score less and plus one standard error, inside what a score can be."""
    judged = pareto.judged(trial)
    assert judged is not None
    error = judged.standard_error if math.isfinite(judged.standard_error) else 0.0
    return max(judged.value - error, 0.0), min(judged.value + error, 1.0)


def _staircase(points: Sequence[pareto.Point], x: Axis, y: Axis) -> str:
    best = pareto.staircase(points)
    if len(best) < 2:
        return ""
    path = f"M{x(best[0][1]):.1f} {y(best[0][0]):.1f}"
    path += "".join(f"H{x(p[1]):.1f}V{y(p[0]):.1f}" for p in best[1:])
    return stroke("stairs", f"{path}")


def score_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Never beyond what a score can be, and never so narrow that noise looks like a difference."""
    low, high = min(values), max(values)
    if high - low < 0.1:
        low, high = (low + high) / 2 - 0.05, (low + high) / 2 + 0.05
    room = 0.06 * (high - low)
    return Axis(max(low - room, -0.02), min(high + room, 1.02), start, end)


def untuned_line(y: Axis, untuned: float | None, left: float, right: float) -> list[str]:
    if untuned is None or not math.isfinite(untuned):
        return []
    place = y(untuned)
    return [
        stroke("untuned", f"M{left} {place:.1f}H{right}"),
        f'<text class="note" x="{right - 4}" y="{place - 5:.1f}" text-anchor="end">untuned backbone, test split</text>',
    ]


def frame(
    x: Axis,
    y: Axis,
    left: float,
    right: float,
    top: float,
    bottom: float,
    x_label: str,
    say_x: Callable[[float], str],
    say_y: Callable[[float], str],
) -> list[str]:
    """Grid, ticks and the name of the horizontal axis (the vertical one is said above the chart)."""
    body = []
    for tick in y.ticks(5):
        said = say_y(tick).replace(f".0{wording.SPACE}", wording.SPACE)
        body.append(stroke("grid", f"M{left} {y(tick):.1f}H{right}"))
        body.append(write("tick", left - 7, y(tick) + 4, said, "end"))
    edge = -math.inf
    for tick in x.ticks(max(2, int((right - left) // 110))):
        said = say_x(int(tick) if float(tick).is_integer() and say_x is wording.number else tick)
        half = CHARACTER * len(said) / 2
        if x(tick) - half < edge + 6 or x(tick) + half > right + 14:
            continue
        edge = x(tick) + half
        body.append(stroke("grid", f"M{x(tick):.1f} {top}V{bottom}"))
        body.append(write("tick", x(tick), bottom + 18, said, "middle"))
    body.append(write("axis", (left + right) / 2, bottom + 38, x_label, "middle"))
    return body


def write(kind: str, x: float, y: float, said: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>'


def stroke(kind: str, moves: str) -> str:
    return f'<path class="{kind}" d="{moves}"/>'


def hover(trial: Trial, title: str) -> str:
    """The lines of the hover, joined by newlines."""
    judged = pareto.judged(trial)
    found = wording.plus_minus(judged.value, judged.standard_error) if judged else trial.status
    searched = [n for n in pareto.searched(trial.method) if n in trial.configuration]
    seeds = len(pareto.runs(trial))
    lines = [
        wording.method(trial.method) + (f": {title}" if title else ""),
        (f"{wording.metric(judged.metric)} {found}" if judged else found) + (f", {seeds} seeds" if seeds > 1 else ""),
        f"{wording.duration(trial.train_seconds or trial.seconds)}, {wording.memory(trial.peak_memory_mb)}",
        *(f"{wording.spoken(n)}: {wording.hyperparameter(n, trial.configuration[n])}" for n in searched),
    ]
    return f'data-trial="{escape(trial.id)}" data-tip="{escape(chr(10).join(lines))}"'


def figure(width: int, height: int, title: str, body: Sequence[str], fluid: bool = True) -> str:
    size = 'style="width:100%;height:auto"' if fluid else f'width="{width}" height="{height}"'
    return (
        f'<svg viewBox="0 0 {width} {height}" {size} role="img" aria-label="{escape(title)}">'
        + "".join(body)
        + "</svg>"
    )
