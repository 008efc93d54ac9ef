"""Sizes read off a model are the model's."""

from __future__ import annotations

import json

import pytest
from mlx.utils import tree_flatten

from metapeft.backbones.forward import anatomy
from metapeft.peft.matrices import linear_layers, shape
from metapeft.profiling.shapes import Shapes, shapes
from tests.backbones.tiny import ARCHITECTURES, tiny


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shapes_of_every_architecture(architecture: str, quantized: bool) -> None:
    model = tiny(architecture, quantized=quantized).model
    found = shapes(model)
    assert (found.depth, found.width, found.head_width) == (4, 64, 16)
    assert found.weight_bytes == sum(v.nbytes for _, v in tree_flatten(model.parameters()))
    paths = {
        f"{found.root}.{index}.{name}": size
        for index, layer in enumerate(found.each())
        for name, size in layer.linear.items()
    }
    assert paths == {path: shape(linear) for path, linear in linear_layers(model).items()}
    assert Shapes.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert found.takes("lora") and found.takes("prefix")
    if not quantized:
        parts = anatomy(model)
        for layer, group in zip(getattr(parts.body, parts.layers), found.each(), strict=True):
            assert group.parameters == sum(v.size for _, v in tree_flatten(layer.parameters()))


def test_multi_head_latent_attention_takes_no_prefix() -> None:
    found = shapes(tiny("minicpm3").model)
    assert found.takes("prompt") and not found.takes("prefix")
    assert not Shapes.from_json(json.loads(json.dumps(found.to_json()))).takes("prefix")
