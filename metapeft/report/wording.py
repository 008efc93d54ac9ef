"""How numbers and names are said to people, the same in every report, picture and table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

METHODS = {
    "lora": "LoRA",
    "adalora": "AdaLoRA",
    "prompt": "prompt tuning",
    "prefix": "prefix tuning",
    "p_tuning": "P-tuning",
    "switching": "switching methods",
}
METRICS = {"accuracy": "accuracy", "macro_f1": "macro F1", "exact_match": "exact match"}
ENDINGS = {"diverged": "diverged", "out_of_memory": "out of memory", "failed": "failed", "stopped": "stopped early"}
# Okabe and Ito's colours, which most colour-blind people tell apart.
COLOURS = {"lora": "#0072B2", "adalora": "#D55E00", "prompt": "#009E73", "prefix": "#CC79A7", "p_tuning": "#E69F00"}
SPACE = "\u202f"  # narrow, does not break


def method(name: str) -> str:
    return METHODS.get(name, name)


def metric(name: str) -> str:
    return METRICS.get(name, name)


def ending(status: str) -> str:
    """How a trial ended."""
    return ENDINGS.get(status, "no score" if status == "ok" else status)


def score(value: float | None, digits: int = 1) -> str:
    """A score between 0 and 1, in percent."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}{SPACE}%"


def plus_minus(value: float | None, error: float | None) -> str:
    """A score with its standard error, in percent."""
    if value is None or error is None or not math.isfinite(value) or not math.isfinite(error):
        return score(value)
    return f"{100 * value:.1f} ± {100 * error:.1f}{SPACE}%"


def probability(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    if 0 < value < 0.01 or 0.99 < value < 1:
        return f"{'<' if value < 0.5 else '>'}{SPACE}{1 if value < 0.5 else 99}{SPACE}%"
    return f"{100 * value:.0f}{SPACE}%"


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f}{SPACE}s"
    if seconds < 599.5:
        return f"{seconds:.0f}{SPACE}s"
    minutes = round(seconds / 60)
    return f"{minutes}{SPACE}min" if minutes < 60 else f"{minutes // 60}{SPACE}h {minutes % 60}{SPACE}min"


def memory(mb: float | None) -> str:
    if mb is None or not math.isfinite(mb):
        return "–"
    return f"{mb / 1024:.1f}{SPACE}GB" if mb >= 1024 else f"{mb:.0f}{SPACE}MB"


def size(count: float | None) -> str:
    """Bytes."""
    if not count or not math.isfinite(count):
        return "–"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.{1 if count < 100 * scale else 0}f}{SPACE}{unit}"
    return f"{count:.0f}{SPACE}B"


def number(value: Any) -> str:
    """A number of any size, short; other values as they are."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", SPACE) if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return "–"
        return f"{value:,.0f}".replace(",", SPACE) if abs(value) >= 10_000 else f"{value:.4g}"
    return "–" if value is None else str(value)


def hyperparameter(name: str, value: Any) -> str:
    """A value as a person would say it: no targets means every linear layer."""
    if name == "targets":
        return ", ".join(value) if value else "all linear layers"
    if name == "layers" and value == 0:
        return "all"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else number(value)


def configuration(values: Mapping[str, Any], names: list[str] | None = None) -> str:
    """ "rank 8, learning rate 0.001, …": `names` only, or all but the method."""
    chosen = names if names is not None else [name for name in values if name != "method"]
    return ", ".join(f"{spoken(name)} {hyperparameter(name, values[name])}" for name in chosen if name in values)


def spoken(name: str) -> str:
    """`learning_rate` -> "learning rate"."""
    return name.replace("_", " ")
