"""How noisy the gradient is: the simple noise scale of McCandlish et al. 2018 (arXiv:1812.06162, appendix A.1).

A batch is computed in shards anyway, and the gradient of a shard is that of a smaller batch. From the squared norms of
both follow the variance of one example's gradient and the squared norm of the true one; their ratio is the batch size
at which noise and signal are equally large.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from metapeft.runtime import mx

MEMORY = 0.9  # of the running means: a single step says little


class GradientNoise:
    """Running means of both estimates, as [variance, squared norm, weight]."""

    def __init__(self) -> None:
        self.state = [0.0, 0.0, 0.0]

    def update(self, gradients: Sequence[mx.array], sizes: Sequence[int]) -> None:
        """gradients: of each shard, their sum being the batch's; sizes: examples in each."""
        count, total = len(sizes), sum(sizes)
        if count < 2:
            return
        whole = sum(gradients[1:], gradients[0])
        small = [mx.sum(g * g) * (total / size) ** 2 for g, size in zip(gradients, sizes, strict=True)]
        large, *squares = np.array(mx.stack([mx.sum(whole * whole), *small]), dtype=float)
        # Each shard: |g|^2 = |G|^2 + S / size in the mean, and so for the whole.
        inverse = sum(1 / size for size in sizes) / count
        variance = (sum(squares) / count - large) / (inverse - 1 / total)
        found = (float(variance), float(large - variance / total), 1.0)
        self.state = [MEMORY * old + (1 - MEMORY) * new for old, new in zip(self.state, found, strict=True)]

    def scale(self) -> float | None:
        """In examples; None while it is not known, or while the gradient is lost in its noise."""
        variance, norm, weight = self.state
        return variance / norm if weight > 0 and norm > 0 and variance > 0 else None
