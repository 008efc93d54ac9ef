"""How fast this machine runs a backbone: a benchmark of a few seconds, once per machine and backbone.

A rate in FLOP/s of matrix products alone would promise too much: on a CPU norms, activations and softmax take as long
as the products. So the backbone's own layers are timed, forwards and with gradients, by as many workers as training
uses.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metapeft.profiling import cache
from metapeft.settings import home

if TYPE_CHECKING:
    from metapeft.backbones import Backbone
    from metapeft.runtime import mx

WORK = 4e10  # FLOPs per timed pass and worker, about


@dataclass(frozen=True)
class Speed:
    """Seconds per token through all layers, and per position through the output head, all workers working.

    `gradient` is forward and backward together; `step` is what a pass takes however few tokens it has; `measured` says
    where and how.
    """

    forward: float
    gradient: float
    head_forward: float
    head_gradient: float
    step: float
    measured: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def of(backbone: Backbone) -> Speed:
    """Measured now, or read from METAPEFT_HOME/speed."""
    known = read(backbone.content_id)
    if known is None:
        known = measure(backbone)
        cache.write(_path(backbone.content_id), known.to_json())
    return known


def read(backbone_content: str) -> Speed | None:
    """What was measured before on this machine for this backbone."""
    record = cache.read(_path(backbone_content))
    try:
        known = None if record is None else Speed(**record)
    except TypeError:
        return None
    rates = (
        () if known is None else (known.forward, known.gradient, known.head_forward, known.head_gradient, known.step)
    )
    return known if all(isinstance(rate, int | float) and rate > 0 for rate in rates) else None


def measure(backbone: Backbone) -> Speed:
    """The better of two passes of each kind."""
    from metapeft.backbones.forward import run
    from metapeft.profiling.shapes import shapes
    from metapeft.runtime import mx
    from metapeft.training.workers import workers

    model, sizes = backbone.model, shapes(backbone.model)
    hands = workers()
    parameters = sum(layer.parameters for layer in sizes.each())
    length = 48
    rows = int(min(8, max(1, WORK / (2 * parameters * length))))
    ids = mx.zeros((rows, length), dtype=mx.int32)
    states = 0.1 * mx.random.normal((rows, length, sizes.width), key=mx.random.key(0))
    places = mx.arange(min(32, rows * length))

    def layers(x: mx.array) -> mx.array:
        return run(model, ids, embeddings=x, logits=False).astype(mx.float32).sum()

    def layers_of_one(x: mx.array) -> mx.array:
        return run(model, ids[:1, :1], embeddings=x[:1, :1], logits=False).astype(mx.float32).sum()

    def head(x: mx.array) -> mx.array:
        logits = run(model, ids, start=sizes.depth, hidden=x, rows=places)
        return mx.logsumexp(logits.astype(mx.float32), axis=-1).sum()

    timed = {
        "forward": (layers, rows * length),
        "gradient": (mx.grad(layers), rows * length),
        "head_forward": (head, places.size),
        "head_gradient": (mx.grad(head), places.size),
    }
    mx.eval(states, ids, places)

    def seconds(call: Callable[[mx.array], mx.array]) -> float:
        best = float("inf")
        for _ in range(2):
            begin = time.perf_counter()
            hands.map([lambda: call(states)] * hands.count)
            best = min(best, time.perf_counter() - begin)
        return best

    found = {name: seconds(call) / (hands.count * n) for name, (call, n) in timed.items()}
    about = _machine() | {"workers": hands.count, "rows": rows, "tokens": length}
    return Speed(**found, step=seconds(mx.grad(layers_of_one)), measured=about)


def _machine() -> dict[str, Any]:
    from metapeft.runtime import describe

    about = describe()
    return {name: about[name] for name in ("device", "device_name", "blas", "cores", "platform", "mlx")}


def _path(backbone_content: str) -> Path:
    key = hashlib.sha256(json.dumps(_machine(), sort_keys=True).encode()).hexdigest()[:12]
    return home() / "speed" / f"{backbone_content}-{key}.json"
