"""The committed reference values (tests/reference), as metapeft's own objects."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import mlx_lm.utils
import numpy as np
from safetensors.numpy import load_file

from metapeft.runtime import mx, nn
from metapeft.training.encode import Encoded

DATA = Path(__file__).resolve().parent.parent / "reference" / "data"
BASE = DATA / "base"
CASES = sorted(path.parent.name for path in DATA.glob("*/case.json"))
FOLDERS = sorted(path.parent.name for path in DATA.glob("*/adapter"))


def model() -> nn.Module:
    loaded, _ = mlx_lm.utils.load_model(BASE)
    return loaded


@functools.cache
def values(case: str) -> dict[str, np.ndarray]:
    return load_file(DATA / case / "values.safetensors")


def group(case: str, start: str) -> dict[str, mx.array]:
    """The values whose names begin with `start.`, without it."""
    return {k.removeprefix(f"{start}."): mx.array(v) for k, v in values(case).items() if k.startswith(f"{start}.")}


@functools.cache
def facts(name: str) -> Any:
    return json.loads((DATA / name).read_text())


def batch(index: int = 0) -> list[Encoded]:
    rows = facts("batches.json")[index]
    return [
        Encoded(tuple(tokens[:length]), prompt)
        for tokens, prompt, length in zip(rows["tokens"], rows["prompt_lengths"], rows["lengths"], strict=True)
    ]


def assert_same_logits(logits: mx.array, case: str, tolerance: float = 1e-4) -> None:
    """Compares (batch, tokens, vocabulary) with a case's logits, at the real tokens."""
    rows = facts("batches.json")[0]
    real = np.arange(logits.shape[1])[None] < np.array(rows["lengths"])[:, None]
    np.testing.assert_allclose(np.array(logits)[real], values(case)["logits"][real], rtol=0, atol=tolerance)


def tokens() -> mx.array:
    return mx.array(facts("batches.json")[0]["tokens"])
