"""How fast this machine runs a backbone: a benchmark of a few seconds, once per machine and backbone.

A rate in FLOP/s of matrix products alone would promise too much: on a CPU norms, activations and softmax take as long
as the products. So the backbone's own layers are timed, forwards and with gradients, by as many workers as training
uses, and by the code that trains. On a CPU the processor's time counts where it is less than the clock's: other work on
the machine at this moment says nothing about later.
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
    from metapeft.kernels.decoder import Decoder
    from metapeft.profiling.shapes import Shapes
    from metapeft.runtime import mx, nn

VERSION = 2  # of how it is measured
WORK = 4e10  # FLOPs per timed pass and worker, about
LENGTH = 48  # tokens of a sequence
PASSES = 3
UNEVEN = 1.1


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
    """The best of a few passes of each kind, by the way that training goes here: native, or MLX's."""
    from metapeft.backbones.forward import run
    from metapeft.kernels.decoder import decoder
    from metapeft.profiling.shapes import shapes
    from metapeft.runtime import mx, processor
    from metapeft.training.workers import workers

    mx.eval(run(backbone.model, mx.array([[0]])))  # lazy constants (rotary frequencies): now every thread may use them
    sizes, hands = shapes(backbone.model), workers()
    parameters = sum(layer.parameters for layer in sizes.each())
    rows = int(min(8, max(1, WORK / (2 * parameters * LENGTH))))
    view = decoder(backbone.model)
    passes = _by_mlx(backbone.model, sizes, rows) if view is None else _natively(view, sizes, rows)

    def seconds(call: Callable[[], Any]) -> float:
        best = float("inf")
        for _ in range(PASSES):
            wall, cpu = time.perf_counter(), time.process_time()
            hands.map([call] * hands.count)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            # Workers wait for each other, which costs a little; for other programs they do not wait on a machine's own.
            best = min(best, wall, UNEVEN * cpu / hands.count) if about["device"] == "cpu" else min(best, wall)
        return best

    about = _machine() | {
        "processor": processor(),
        "workers": hands.count,
        "rows": rows,
        "tokens": LENGTH,
        "way": "mlx" if view is None else "native",
    }
    found = {name: seconds(call) / (hands.count * n) for name, (call, n) in passes.items() if name != "step"}
    step = seconds(passes["step"][0])
    if view is not None:
        view.release()
    return Speed(**found, step=step, measured=about)


def _natively(view: Decoder, sizes: Shapes, rows: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """What a worker is given, and how many tokens or positions it computes."""
    import numpy as np

    from metapeft.kernels.decoder import Gradients, Rows

    states = np.random.default_rng(0).normal(0, 0.1, (rows * LENGTH, sizes.width)).astype(np.float32)
    positions = list(range(min(32, len(states))))

    def layers(count: int, gradient: bool) -> Callable[[], Any]:
        sequences = range(min(LENGTH, count), count + 1, LENGTH)
        held = Rows(states[:count].copy(), list(sequences))
        if not gradient:
            return view.predict(held, [], [])
        return view.loss_and_gradients(held, [0], [0], 1.0, Gradients({}, hidden=np.zeros_like(held.hidden)))

    def head(gradient: bool) -> Callable[[], Any]:
        held = Rows(states.copy(), [len(states)], start=sizes.depth)
        if not gradient:
            return view.predict(held, positions, positions)
        return view.loss_and_gradients(
            held, positions, positions, 1.0, Gradients({}, hidden=np.zeros_like(held.hidden))
        )

    return {
        "forward": (lambda: layers(len(states), False), len(states)),
        "gradient": (lambda: layers(len(states), True), len(states)),
        "head_forward": (lambda: head(False), len(positions)),
        "head_gradient": (lambda: head(True), len(positions)),
        "step": (lambda: layers(1, True), 1),
    }


def _by_mlx(model: nn.Module, sizes: Shapes, rows: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """The same on MLX: graphs, which the worker evaluates."""
    from metapeft.backbones.forward import run
    from metapeft.runtime import mx

    ids = mx.zeros((rows, LENGTH), dtype=mx.int32)
    states = 0.1 * mx.random.normal((rows, LENGTH, sizes.width), key=mx.random.key(0))
    positions = mx.arange(min(32, rows * LENGTH))
    mx.eval(ids, states, positions)

    def layers(x: mx.array) -> mx.array:
        return run(model, ids, embeddings=x, logits=False).astype(mx.float32).sum()

    def layers_of_one(x: mx.array) -> mx.array:
        return run(model, ids[:1, :1], embeddings=x[:1, :1], logits=False).astype(mx.float32).sum()

    def head(x: mx.array) -> mx.array:
        logits = run(model, ids, start=sizes.depth, hidden=x, rows=positions)
        return mx.logsumexp(logits.astype(mx.float32), axis=-1).sum()

    return {
        "forward": (lambda: layers(states), rows * LENGTH),
        "gradient": (lambda: mx.grad(layers)(states), rows * LENGTH),
        "head_forward": (lambda: head(states), positions.size),
        "head_gradient": (lambda: mx.grad(head)(states), positions.size),
        "step": (lambda: mx.grad(layers_of_one)(states), 1),
    }


def _machine() -> dict[str, Any]:
    from metapeft.runtime import describe

    about = describe()
    return {name: about[name] for name in ("device", "device_name", "blas", "cores", "platform", "mlx")}


def _path(backbone_content: str) -> Path:
    key = hashlib.sha256(json.dumps([VERSION, _machine()], sort_keys=True).encode()).hexdigest()[:12]
    return home() / "speed" / f"{backbone_content}-{key}.json"
