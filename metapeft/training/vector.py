"""Parameters as one vector.

An adapter has hundreds of small arrays. Adding, clipping and stepping them one by one costs far more than the
arithmetic; as one vector it is a handful of operations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from metapeft.runtime import mx


class Layout:
    """Where each leaf of a parameter tree lies in the vector."""

    def __init__(self, tree: Any):
        found = leaves(tree)
        self.names = [name for name, _ in found]
        self.shapes = [leaf.shape for _, leaf in found]
        self.ends: list[int] = np.cumsum([leaf.size for _, leaf in found]).tolist()

    def join(self, tree: Any) -> mx.array:
        """A tree of this layout -> (parameters,) float32."""
        return mx.concatenate([leaf.reshape(-1).astype(mx.float32) for _, leaf in leaves(tree)])

    def split(self, vector: mx.array) -> Any:
        """(parameters,) -> a tree whose leaves share the vector's memory."""
        parts = mx.split(vector, self.ends[:-1])
        return tree_unflatten(
            [(name, part.reshape(shape)) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)]
        )


def leaves(tree: Any) -> list[tuple[str, mx.array]]:
    """(dotted name, array) of every leaf."""
    return tree_flatten(tree)  # type: ignore[return-value]
