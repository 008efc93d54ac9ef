"""A whole Llama-like decoder on a CPU core as one native call: forward, loss and gradients (decoder.cpp).

MLX runs a training step as some ten thousand small operations, each with an array of its own, a task for its scheduler
and a walk through memory: on a CPU that costs more than the arithmetic. Here a step is one call that works in one block
of memory, computes what sequences share once, pads nothing and does no work for gradients that nobody asks for.

`decoder(model)` recognises a model by its parts and then compares logits with MLX's own, so an architecture that only
looks like Llama is left to MLX. So is everything on a GPU, other precisions than float32, and a machine without a C++
compiler or a fast BLAS.
"""

from __future__ import annotations

import ctypes
import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from metapeft import blas
from metapeft.backbones.forward import Gated, Prefix, anatomy, run
from metapeft.errors import UserError
from metapeft.peft.adalora import TripletLowRank
from metapeft.peft.lora import LowRank
from metapeft.peft.matrices import Adapted
from metapeft.progress import say
from metapeft.runtime import device, mx, nn

SOURCE = Path(__file__).with_name("decoder.cpp")
# As -ffast-math, but NaN and infinity stay what they are, and the process's floating-point mode is left alone.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-freciprocal-math",
)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
# Rotary embeddings whose angles follow from the position alone (not from how long the sequence is).
ROPES = ("RoPE", "Llama3RoPE", "YarnRoPE", "SuScaledRoPE", "ProportionalRoPE", "NoPE")
STEP = 2**20  # memory grows by whole steps of so many floats

_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float


class _Linear(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("weight", "bias", "a", "e", "b", "da", "de", "db")),
        *((name, _int) for name in ("inputs", "outputs", "rank", "index")),
        *((name, _float) for name in ("scale", "dropout")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("linear", _Linear * len(LINEARS)),
        *(
            (name, _pointer)
            for name in (
                *("norm_attention", "norm_mlp", "norm_q", "norm_k", "cosine", "sine"),
                *("prefix_keys", "prefix_values", "prefix_keys_gradient", "prefix_values_gradient", "keys", "values"),
            )
        ),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("layers", "norm", "head", "gemm")),
        *(
            (name, _int)
            for name in ("width", "inner", "heads", "kv_heads", "head_width", "rotary", "traditional", "vocabulary")
        ),
        ("epsilon", _float),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        *(
            (name, _pointer)
            for name in (
                *("ends", "hidden", "hidden_gradient", "chosen", "targets", "roots", "loss", "hit", "root_scores"),
            )
        ),
        ("seed", ctypes.c_uint64),
        *(
            (name, _int)
            for name in (
                *("rows", "sequences", "common", "prefix", "start", "stop", "count", "root_count"),
                *("train", "checkpoint", "gated"),
            )
        ),
        *((name, _float) for name in ("weight", "gate")),
    )


@dataclass
class Rows:
    """Tokens of several sequences, one after another.

    hidden: (rows, width) float32, the input of layer `start`; it is overwritten. ends: the row after each sequence's
    last. common: how many rows come first that all later sequences attend to (then the first sequence is they).
    prefix: what everything attends to before that, (1, kv_heads, tokens, head width) per layer.
    """

    hidden: np.ndarray
    ends: Sequence[int]
    common: int = 0
    prefix: Prefix | None = None
    start: int = 0
    stop: int | None = None


@dataclass
class Found:
    """loss, hit: (chosen rows,); root_scores: log-likelihoods, (chosen rows, roots); hidden: the last output."""

    hidden: np.ndarray
    loss: np.ndarray
    hit: np.ndarray
    root_scores: np.ndarray


@dataclass
class Gradients:
    """Where gradients go: of adapted layers by the identity of their change, of the rows, of the prefix per layer."""

    deltas: dict[int, dict[str, np.ndarray]]
    hidden: np.ndarray | None = None
    prefix: list[tuple[np.ndarray, np.ndarray]] | None = None


class Decoder:
    """One model's view for the native code. Calls may run at the same time; none of them changes the model."""

    def __init__(self, model: nn.Module, library: ctypes.CDLL, gemm: int):
        """Raises _Unlike when the model is not of the kind that decoder.cpp computes."""
        parts = anatomy(model)
        self._library = library
        self._layers = list(getattr(parts.body, parts.layers))
        embedding, norm = getattr(parts.body, parts.embed), getattr(parts.body, parts.norm)
        tied = bool(getattr(getattr(model, "args", None), "tie_word_embeddings", False))
        head: Any = embedding if tied else getattr(model, "lm_head", None)
        _require(type(embedding) is nn.Embedding and type(head) in (nn.Embedding, nn.Linear) and "bias" not in head)
        first = _part(self._layers[0], "self_attn")
        rope = getattr(first, "rope", None)
        heads, kv_heads = (getattr(first, name, 0) for name in ("n_heads", "n_kv_heads"))
        _require(heads > 0 and kv_heads > 0 and heads % kv_heads == 0)
        width = embedding.weight.shape[1]
        head_width = _base(first.q_proj).weight.shape[0] // heads
        inner = _base(self._layers[0].mlp.gate_proj).weight.shape[0]
        inputs, outputs = heads * head_width, kv_heads * head_width
        shapes = [(inputs, width), (outputs, width), (outputs, width), (width, inputs)]
        shapes += [(inner, width), (inner, width), (width, inner)]  # in the order of LINEARS
        norms = [norm]
        for layer in self._layers:
            attention, mlp = _part(layer, "self_attn"), _part(layer, "mlp")
            _require(_takes(layer) == _takes(attention) == {"x", "mask", "cache"})  # and no scale by position
            _require((attention.n_heads, attention.n_kv_heads) == (heads, kv_heads))
            _require(type(getattr(attention, "rope", None)).__name__ in ROPES)
            for name, shape in zip(LINEARS, shapes, strict=True):
                base = _base(_part(layer[_owner(name)], name))
                _require(base.weight.shape == shape and ("bias" not in base or base.bias.shape == shape[:1]))
            _require(all(_part(layer, name).weight.shape == (width,) for name in NORMS))
            _require(all(attention[n].weight.shape == (head_width,) for n in ("q_norm", "k_norm") if n in attention))
            norms += [_part(layer, name) for name in NORMS]
            norms += [attention[name] for name in ("q_norm", "k_norm") if name in attention]
            for owner, names in ((attention, LINEARS[:4]), (mlp, LINEARS[4:])):
                _require(all(type(_base(owner[name])) is nn.Linear if name in owner else False for name in names))
        _require(all(type(n) is nn.RMSNorm and n.eps == norm.eps for n in norms))
        _require(all(v.dtype == mx.float32 for v in (embedding.weight, head.weight, norm.weight)))
        _require(head.weight.shape == embedding.weight.shape and norm.weight.shape == (width,))
        _require(len({int(getattr(each.self_attn.rope, "dims", head_width)) for each in self._layers}) == 1)
        self.embedding = _array(embedding.weight)
        self.depth, self.width = len(self._layers), width
        self.kv_heads, self.head_width = kv_heads, head_width
        rotary = int(getattr(rope, "dims", head_width))
        self._half, self._traditional = rotary // 2, bool(getattr(rope, "traditional", False))
        self._ropes = [layer.self_attn.rope for layer in self._layers]
        self._tables: list[tuple[np.ndarray, np.ndarray]] = []
        self._head, self._norm = _array(head.weight), _array(norm.weight)
        self._model = _Model(
            norm=_address(self._norm),
            head=_address(self._head),
            gemm=gemm,
            width=width,
            inner=inner,
            heads=heads,
            kv_heads=kv_heads,
            head_width=head_width,
            rotary=rotary,
            traditional=self._traditional,
            vocabulary=head.weight.shape[0],
            epsilon=norm.eps,
        )
        self.window = _window(model)
        self._memory: dict[int, mx.array] = {}
        self._lock = threading.Lock()
        self._rotations(512)

    def covers(self, stop: int | None = None) -> bool:
        """Whether all linear layers (below `stop`) are now of the kinds known here: plain, LoRA or AdaLoRA."""
        try:
            for layer in self._layers[:stop]:
                for name in LINEARS:
                    module = layer[_owner(name)][name]
                    _require(module.__class__ is nn.Linear or _adapted(module))
        except _Unlike:
            return False
        return True

    def release(self) -> None:
        """Gives the working memory back."""
        self._memory.clear()

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """(tokens, width)"""
        return self.embedding[np.asarray(ids, dtype=np.int64)]

    def record(self, rows: Rows) -> Prefix:
        """Keys and values of the prefix and all rows (of one sequence), by layer; those of layers not run are empty."""
        before = rows.prefix[0][0].shape[2] if rows.prefix else 0
        shape = (self.kv_heads, before + len(rows.hidden), self.head_width)
        stop = self.depth if rows.stop is None else rows.stop
        kept = [
            (np.empty(shape, np.float32), np.empty(shape, np.float32))
            if rows.start <= i < stop
            else (np.zeros(shape, np.float32),) * 2
            for i in range(self.depth)
        ]
        self._prepared(rows, kept=kept)()
        held = [(mx.array(k[None]), mx.array(v[None])) for k, v in kept]
        return rows.prefix.like(held) if isinstance(rows.prefix, Gated) else held

    def forward(self, rows: Rows) -> np.ndarray:
        """The hidden state after layer `stop` - 1, (rows, width)."""
        self._prepared(rows)()
        return rows.hidden

    def predict(
        self, rows: Rows, chosen: Sequence[int], targets: Sequence[int], roots: Sequence[int] = ()
    ) -> Callable[[], Found]:
        """What the chosen rows predict, when called: `targets` are the tokens that follow them."""
        return self._prepared(rows, chosen=chosen, targets=targets, roots=roots)

    def loss_and_gradients(
        self,
        rows: Rows,
        chosen: Sequence[int],
        targets: Sequence[int],
        weight: float,
        gradients: Gradients,
        *,
        seed: int = 0,
        checkpoint: bool = False,
    ) -> Callable[[], float]:
        """When called: the sum of the chosen rows' losses times `weight`, with dropout; fills `gradients` by it."""
        call = self._prepared(
            rows, chosen=chosen, targets=targets, weight=weight, gradients=gradients, seed=seed, checkpoint=checkpoint
        )
        return lambda: float(call().loss.sum(dtype=np.float64) * weight)

    def _prepared(
        self,
        rows: Rows,
        *,
        chosen: Sequence[int] = (),
        targets: Sequence[int] = (),
        roots: Sequence[int] = (),
        weight: float = 0.0,
        gradients: Gradients | None = None,
        kept: list[tuple[np.ndarray, np.ndarray]] | None = None,
        seed: int = 0,
        checkpoint: bool = False,
    ) -> Callable[[], Found]:
        """Parameters are read now; what is returned computes with them, whatever the model holds by then."""
        stop = self.depth if rows.stop is None else rows.stop
        before = rows.prefix[rows.start][0].shape[2] if rows.prefix and rows.start < stop else 0
        gate = rows.prefix if before and isinstance(rows.prefix, Gated) else None
        alive: list[Any] = [rows, gradients, kept]  # arrays whose memory the structures name
        layers = (_Layer * self.depth)()
        tables = self._rotations(before + rows.common + int(np.diff(rows.ends, prepend=0).max()))
        for i in range(rows.start, stop):
            self._fill(layers[i], i, tables[i], gradients, alive)
            if before:
                assert rows.prefix is not None
                keys, values = (np.ascontiguousarray(_array(part)) for part in rows.prefix[i])
                alive += [keys, values]
                layers[i].prefix_keys, layers[i].prefix_values = _address(keys), _address(values)
            if gradients is not None and gradients.prefix is not None:
                layers[i].prefix_keys_gradient, layers[i].prefix_values_gradient = map(_address, gradients.prefix[i])
            if kept is not None:
                layers[i].keys, layers[i].values = map(_address, kept[i])
        found = Found(
            rows.hidden,
            np.zeros(len(chosen), np.float32),
            np.zeros(len(chosen), np.float32),
            np.zeros((len(chosen), len(roots)), np.float32),
        )
        integers = [np.array(values, dtype=np.int32) for values in (rows.ends, chosen, targets, roots)]
        batch = _Batch(
            *(_address(integers[0]), _address(rows.hidden)),
            None if gradients is None or gradients.hidden is None else _address(gradients.hidden),
            *(_address(integers[1]), _address(integers[2]), _address(integers[3])),
            *(_address(found.loss), _address(found.hit), _address(found.root_scores)),
            seed,
            *(len(rows.hidden), len(rows.ends), rows.common, before, rows.start, stop, len(chosen), len(roots)),
            *(gradients is not None, checkpoint, 0 if gate is None else gate.tokens),
            *(weight, 0.0 if gate is None else gate.bias),
        )
        model = _Model.from_buffer_copy(self._model)
        model.layers = ctypes.addressof(layers)
        alive += [tables, integers, layers]

        def call() -> Found:
            arguments = (ctypes.byref(model), ctypes.byref(batch))
            memory = self._room(self._library.metapeft_decoder_size(*arguments))
            self._library.metapeft_decoder_run(*arguments, memory)
            alive.clear()
            return found

        return call

    def _fill(
        self,
        into: _Layer,
        index: int,
        table: tuple[np.ndarray, np.ndarray],
        gradients: Gradients | None,
        alive: list[Any],
    ) -> None:
        layer = self._layers[index]

        def named(value: mx.array) -> int:
            view = _array(value)
            alive.append(view)
            return _address(view)

        attention = layer["self_attn"]
        into.norm_attention = named(layer["input_layernorm"]["weight"])
        into.norm_mlp = named(layer["post_attention_layernorm"]["weight"])
        if "q_norm" in attention:
            into.norm_q, into.norm_k = named(attention["q_norm"]["weight"]), named(attention["k_norm"]["weight"])
        into.cosine, into.sine = _address(table[0]), _address(table[1])
        for place, name in enumerate(LINEARS):
            module, linear = layer[_owner(name)][name], into.linear[place]
            base = _base(module)
            weight = base["weight"]
            linear.weight = named(weight)
            linear.outputs, linear.inputs = weight.shape
            linear.index = index * len(LINEARS) + place
            if "bias" in base:
                linear.bias = named(base["bias"])
            if module is base:
                continue
            delta = module["delta"]
            linear.a, linear.b, linear.scale = named(delta["a"]), named(delta["b"]), delta.scale
            linear.rank = delta["a"].shape[0]
            if "e" in delta:
                linear.e = named(delta["e"])
            if gradients is not None:
                linear.dropout = 1 - delta.dropout._p_1
                for part, value in gradients.deltas[id(delta)].items():
                    setattr(linear, f"d{part}", _address(value))

    def _room(self, floats: int) -> int:
        """Working memory of this thread; MLX's, so that its measure of memory counts it."""
        me = threading.get_ident()
        if me not in self._memory or self._memory[me].size < floats:
            self._memory.pop(me, None)
            block = mx.zeros((-(-floats // STEP) * STEP,))
            mx.eval(block)
            self._memory[me] = block
        return _address(_array(self._memory[me]))

    def _rotations(self, positions: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per layer cosines and sines, (positions, rotary / 2), asked of the model's own rotary embeddings."""
        with self._lock:
            if self._tables and len(self._tables[0][0]) >= positions:
                return self._tables
            positions = 1 << (int(positions) - 1).bit_length()
            unit = np.zeros((1, 1, positions, self.head_width), np.float32)
            real = slice(0, 2 * self._half, 2) if self._traditional else slice(0, self._half)
            imaginary = slice(1, 2 * self._half, 2) if self._traditional else slice(self._half, 2 * self._half)
            unit[..., real] = 1
            known: dict[int, tuple[np.ndarray, np.ndarray]] = {}
            contents: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
            tables = []
            for rope in self._ropes:
                if id(rope) not in known:
                    turned = np.array(rope(mx.array(unit)))[0, 0]
                    table = np.ascontiguousarray(turned[:, real]), np.ascontiguousarray(turned[:, imaginary])
                    known[id(rope)] = contents.setdefault(table[0].tobytes() + table[1].tobytes(), table)
                tables.append(known[id(rope)])
            self._tables = tables
            return tables


def decoder(model: nn.Module) -> Decoder | None:
    """The native view of a model, if there can be one here: see the module's text."""
    if device() != "cpu" or (found := native()) is None:
        return None
    try:
        view = Decoder(model, *found)
        return view if _agrees(view, model) else None
    except (_Unlike, UserError, AttributeError, KeyError):
        return None


@lru_cache(maxsize=1)
def native() -> tuple[ctypes.CDLL, int] | None:
    """The compiled library and the address of the BLAS's product; None, after one line that says why, without them."""
    gemm = blas.address("cblas_sgemm")
    if gemm is None:
        return None
    try:
        library = blas.compiled(SOURCE, FLAGS)
    except OSError as error:
        say(f"warning: training is slower without native kernels ({error}); install a C++ compiler (Debian: g++)")
        return None
    library.metapeft_decoder_size.restype = ctypes.c_size_t
    library.metapeft_decoder_size.argtypes = [_pointer, _pointer]
    library.metapeft_decoder_run.restype = None
    library.metapeft_decoder_run.argtypes = [_pointer, _pointer, _pointer]
    return library, gemm


class _Unlike(Exception):
    """The model has a part that decoder.cpp does not know."""


def _require(true: bool) -> None:
    if not true:
        raise _Unlike


def _takes(module: nn.Module) -> set[str]:
    return set(inspect.signature(type(module).__call__).parameters) - {"self"}


def _part(module: Any, name: str) -> Any:
    _require(name in module)
    return module[name]


def _owner(name: str) -> str:
    return "self_attn" if name in LINEARS[:4] else "mlp"


def _adapted(module: Any) -> bool:
    if type(module) is not Adapted or type(module.base) is not nn.Linear:
        return False
    return type(module.delta) in (LowRank, TripletLowRank) and module.delta.a.dtype == mx.float32


def _base(module: Any) -> Any:
    return module["base"] if isinstance(module, Adapted) else module


def _window(model: nn.Module) -> int | None:
    """Positions that a token sees, where the model limits them."""
    sliding = any(getattr(layer, "use_sliding", False) for layer in getattr(model, "layers", ()))
    arguments = getattr(model, "args", None)
    sliding = sliding or bool(getattr(arguments, "use_sliding_window", False))
    return getattr(arguments, "sliding_window", None) if sliding else None


def _agrees(view: Decoder, model: nn.Module) -> bool:
    """Whether losses of a few tokens equal MLX's: other scales, masks or activations show here."""
    ids = [(7 * i * i + 3 * i) % view.embedding.shape[0] for i in range(1, 14)]
    logits = run(model, mx.array([ids[:-1]]))[0].astype(mx.float32)
    expected = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, mx.array(ids[1:])[:, None], axis=-1)[:, 0]
    rows = Rows(view.embed(ids[:-1]), [len(ids) - 1])
    try:
        found = view.predict(rows, range(len(ids) - 1), ids[1:])()
    finally:
        view.release()
    return bool(np.allclose(found.loss, np.array(expected), rtol=1e-4, atol=1e-4))


def _array(value: mx.array) -> np.ndarray:
    """The array's own memory. Raises _Unlike unless it holds float32 without gaps."""
    view = np.asarray(value)
    if view.dtype != np.float32:
        raise _Unlike
    return view if view.flags.c_contiguous else np.ascontiguousarray(view)


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])
