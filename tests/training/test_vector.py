"""A parameter tree as one vector and back."""

from __future__ import annotations

import numpy as np

from metapeft.runtime import mx
from metapeft.training.vector import Layout, leaves


def test_round_trip_keeps_names_shapes_and_values() -> None:
    tree = {
        "deltas": {"layers/0/q": {"a": mx.arange(6.0).reshape(2, 3), "b": mx.ones((4, 1))}},
        "list": [mx.array([7.0])],
    }
    layout = Layout(tree)
    vector = layout.join(tree)
    assert vector.shape == (11,)
    back = dict(leaves(layout.split(vector)))
    assert back.keys() == dict(leaves(tree)).keys()
    for name, leaf in leaves(tree):
        assert back[name].shape == leaf.shape and np.array_equal(back[name], leaf)


def test_gradients_flow_through_the_split() -> None:
    tree = {"a": mx.array([[1.0, 2.0]]), "b": mx.array([3.0])}
    layout = Layout(tree)

    def loss(vector: mx.array) -> mx.array:
        parts = layout.split(vector)
        return (parts["a"] ** 2).sum() * parts["b"].sum()

    assert mx.grad(loss)(layout.join(tree)).tolist() == [6.0, 12.0, 5.0]
