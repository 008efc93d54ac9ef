"""Virtual tokens stand for embeddings: with those of real tokens they do what the real tokens would do."""

from __future__ import annotations

import numpy as np
import pytest

from metapeft.backbones.forward import run
from metapeft.peft import adapters, create, parse
from metapeft.peft.matrices import adaptable
from metapeft.peft.virtual import embed
from metapeft.runtime import mx
from tests.backbones.tiny import ARCHITECTURES, tiny

TEXT, TOKENS = [7, 80, 33, 121], [[5, 9, 200, 31, 77, 4], [9, 8, 7, 6, 5, 4]]


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_started_from_a_text_they_are_the_text(architecture: str, method: str) -> None:
    model = tiny(architecture).model
    expected = model(mx.array([TEXT + row for row in TOKENS]))[:, len(TEXT) :]
    adapter = create(parse(method, {"tokens": len(TEXT)}), model, seed=0, text_ids=TEXT)
    logits = adapters.with_adapter(model, adapter)(mx.array(TOKENS))
    tolerance = 1e-4 * max(1.0, float(mx.max(mx.abs(expected)).item()))
    np.testing.assert_allclose(np.array(logits), np.array(expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text"])
def test_gemmas_embeddings_are_scaled_as_hugging_faces_embedding_layer_does(architecture: str) -> None:
    model = tiny(architecture).model
    np.testing.assert_allclose(
        np.array(embed(model, TEXT)), np.array(run(model, mx.array([TEXT]), stop=0, logits=False)[0]), rtol=1e-6
    )
    plain = model.model.embed_tokens(mx.array(TEXT))
    np.testing.assert_allclose(np.array(embed(model, TEXT)), np.array(plain * 8), rtol=1e-6)  # the root of its width


def test_the_router_of_a_mixture_of_experts_is_adapted_only_when_it_is_named() -> None:
    model = tiny("qwen3_moe").model
    assert {path.rsplit(".", 1)[-1] for path in adaptable(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {path.rsplit(".", 1)[-1] for path in adaptable(model, ["gate"])} == {"gate"}
