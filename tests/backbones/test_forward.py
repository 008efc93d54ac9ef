"""Running a model on what is given to it."""

from __future__ import annotations

import pytest

from metapeft.backbones.forward import run
from metapeft.runtime import mx
from tests.backbones.tiny import ARCHITECTURES, tiny


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gpt2", "minicpm3"])
def test_embeddings_that_are_given_stay_as_they_are(architecture: str) -> None:
    """GPT-2 adds its positions in place."""
    given = mx.random.normal((1, 3, 64), key=mx.random.key(0))
    before = mx.array(given)
    mx.eval(given, before)
    ids = mx.zeros((1, 3), dtype=mx.int32)
    model = tiny(architecture).model
    first, second = (run(model, ids, embeddings=given) for _ in range(2))
    assert mx.array_equal(first, second) and mx.array_equal(given, before)
