"""One step of many sequences at once on CPU cores, as one native call (serve.cpp): what a server does all day.

Every sequence reads its next tokens behind its own keys and values and with its own low-rank adapter; prompts and
single tokens mix. MLX's products are a BLAS's, which copies every weight into an order of its own before it multiplies:
for the few rows of a step that costs more than the product, and reading float32 from memory costs more still. Here
weights lie in that order for good, in the narrowest type that holds them exactly. No sum depends on what else is in
the step.

`native(model)` knows the models that `metapeft.kernels.decoder` knows, and compares logits with MLX's own before it is
believed. What it does not know is left to MLX: other architectures and precisions, a GPU, no compiler, no AVX.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from metapeft import blas
from metapeft.backbones.forward import Prefix, run
from metapeft.kernels import decoder
from metapeft.kernels.decoder import LINEARS
from metapeft.peft.matrices import layer_index
from metapeft.runtime import mx, nn

SOURCE = Path(__file__).with_name("serve.cpp")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-pthread",
)
FULL, HALF, BRAIN = range(3)  # float32, float16, bfloat16
STEP = 2**20  # memory grows by whole steps of so many floats

_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("weight", "bias")),
        *((name, _int) for name in ("inputs", "outputs", "kind")),
    )


class _LowRank(ctypes.Structure):
    _fields_ = (("a", _pointer), ("b", _pointer), ("rank", _int))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("linear", _Matrix * len(LINEARS)),
        *((name, _pointer) for name in ("norm_attention", "norm_mlp", "norm_q", "norm_k", "cosine", "sine")),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("layers", "embedding", "norm")),
        ("head", _Matrix),
        *(
            (name, _int)
            for name in ("depth", "width", "inner", "heads", "kv_heads", "head_width", "rotary", "traditional")
        ),
        ("epsilon", _float),
    )


class _Sequence(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("adapter", "cache")),
        *((name, _int) for name in ("begin", "count", "known", "capacity")),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("sequences", "ids", "owners", "chosen", "logits")),
        *((name, _int) for name in ("rows", "sequence_count", "count", "rank")),
    )


@dataclass(eq=False)
class LowRank:
    """An adapter's matrices as native code sees them. `rank`: the largest."""

    table: Any
    rank: int
    alive: list[np.ndarray]


@dataclass(eq=False)
class Cache:
    """Keys and values of one sequence, of which the first `length` tokens are known. See serve.cpp for their order."""

    memory: np.ndarray
    keys: np.ndarray  # (layers, kv_heads, capacity / lanes, head width, lanes)
    values: np.ndarray  # (layers, kv_heads, capacity, head width)
    length: int = 0

    @property
    def capacity(self) -> int:
        return int(self.values.shape[2])

    def begin_with(self, other: Cache, count: int) -> None:
        """Take the first `count` tokens of another sequence: they must mean the same here."""
        lanes = self.keys.shape[-1]
        blocks = -(-count // lanes)
        self.keys[:, :, :blocks] = other.keys[:, :, :blocks]
        self.values[:, :, :count] = other.values[:, :, :count]
        self.length = count


@dataclass
class Part:
    """Tokens that a sequence reads in a step. wanted: how many of the last ones say what follows."""

    ids: Sequence[int]
    cache: Cache
    adapter: LowRank | None = None
    wanted: int = 1


@dataclass
class _Packed:
    """A matrix in strips, and what keeps its memory."""

    weight: np.ndarray
    kind: int
    bias: np.ndarray | None = None
    alive: list[np.ndarray] = field(default_factory=list)


class Native:
    """One model, packed for steps. One thread at a time computes; it is joined by threads of its own."""

    def __init__(self, view: decoder.Decoder, library: ctypes.CDLL, threads: int):
        """Raises ValueError for shapes that serve.cpp does not compute."""
        self._library, self._view = library, view
        self.lanes = int(library.metapeft_serve_lanes())
        known = view._model
        self.depth, self.vocabulary = view.depth, int(known.vocabulary)
        q_width, kv_width = known.heads * known.head_width, known.kv_heads * known.head_width
        widths = (known.width, known.inner, q_width, kv_width)
        if any(width % (2 * self.lanes) for width in widths) or known.head_width % self.lanes:
            raise ValueError(f"widths {widths} are no multiples of {2 * self.lanes}")
        self._packed: list[_Packed] = []
        self._layers = (_Layer * self.depth)()
        for index, layer in enumerate(view._layers):
            self._fill(self._layers[index], layer)
        self._model = _Model(
            layers=ctypes.addressof(self._layers),
            embedding=decoder._address(view.embedding),
            norm=decoder._address(view._norm),
            head=self._matrix(view._head, None),
            depth=self.depth,
            **{
                name: getattr(known, name)
                for name in ("width", "inner", "heads", "kv_heads", "head_width", "rotary", "traditional", "epsilon")
            },
        )
        self._memory = np.empty(0, np.float32)
        self.threads = threads
        self._team = library.metapeft_serve_start(threads)
        self._pace = _Pace()
        self._lock = threading.Lock()

    def __del__(self) -> None:
        if team := getattr(self, "_team", None):
            self._library.metapeft_serve_stop(team)

    @property
    def bytes(self) -> int:
        """Of the packed weights."""
        return sum(packed.weight.nbytes for packed in self._packed)

    def adapter(self, matrices: Mapping[str, tuple[mx.array, mx.array]]) -> LowRank:
        """matrices: path -> (A, B), (rank, inputs) and (rank, outputs), B scaled."""
        table = (_LowRank * (self.depth * len(LINEARS)))()
        alive: list[np.ndarray] = []
        most = 0
        for path, (a, b) in matrices.items():
            views = [np.ascontiguousarray(np.asarray(part.astype(mx.float32))) for part in (a, b)]
            rank = views[0].shape[0]
            place = layer_index(path) * len(LINEARS) + LINEARS.index(path.rsplit(".", 1)[-1])
            table[place] = _LowRank(decoder._address(views[0]), decoder._address(views[1]), rank)
            alive += views
            most = max(most, rank)
        return LowRank(table, most, alive)

    def cache(self, tokens: int) -> Cache:
        """For a sequence of at most so many tokens."""
        view, capacity = self._view, -(-max(1, tokens) // self.lanes) * self.lanes
        shape = (view.depth, 2, view.kv_heads, capacity, view.head_width)
        memory = np.empty(shape, np.float32)
        keys = memory[:, 0].reshape(view.depth, view.kv_heads, capacity // self.lanes, view.head_width, self.lanes)
        return Cache(memory, keys, memory[:, 1])

    def prefixed(self, cache: Cache, prefix: Prefix) -> None:
        """The sequence begins with virtual tokens: per layer keys and values, (1, kv_heads, tokens, head width)."""
        tokens = int(prefix[0][0].shape[2])
        blocks = -(-tokens // self.lanes)
        for layer, (keys, values) in enumerate(prefix):
            padded = np.zeros((keys.shape[1], blocks * self.lanes, keys.shape[3]), np.float32)
            padded[:, :tokens] = np.asarray(keys.astype(mx.float32))[0]
            ordered = padded.reshape(keys.shape[1], blocks, self.lanes, keys.shape[3]).transpose(0, 1, 3, 2)
            cache.keys[layer, :, :blocks] = ordered
            cache.values[layer, :, :tokens] = np.asarray(values.astype(mx.float32))[0]
        cache.length = tokens

    def step(self, parts: Sequence[Part], apart: bool | None = None) -> np.ndarray:
        """Every part's tokens enter its cache; the logits of the wanted ones, (wanted in all, vocabulary), in order.

        apart: each thread computes sequences of its own, instead of all of them every product together. On idle cores
        the latter is faster for few rows; where other processes want the cores too, waiting for each other costs more
        than it saves. None: as has been faster lately. The result is the same to the bit.
        """
        for part in parts:
            if part.cache.length + len(part.ids) > part.cache.capacity:
                raise ValueError(
                    f"{part.cache.length} and {len(part.ids)} tokens do not fit into a cache of {part.cache.capacity}"
                )
        with self._lock:
            rows = sum(len(part.ids) for part in parts)
            chosen = self._pace.apart(rows) if apart is None else apart
            begin = time.perf_counter()
            logits = self._step(
                _shared_out(parts, self.threads) if chosen else [list(range(len(parts)))], parts, chosen
            )
            self._pace.took(rows, chosen, time.perf_counter() - begin)
        for part in parts:
            part.cache.length += len(part.ids)
        return logits

    def _step(self, groups: Sequence[Sequence[int]], parts: Sequence[Part], apart: bool) -> np.ndarray:
        ends = np.cumsum([part.wanted for part in parts])
        logits = np.empty((int(ends[-1]), self.vocabulary), np.float32)
        steps, alive = (_Step * len(groups))(), []
        outputs = [logits]
        for n, group in enumerate(groups):
            if len(groups) > 1:
                outputs.append(np.empty((sum(parts[i].wanted for i in group), self.vocabulary), np.float32))
            steps[n], arrays = _described([parts[i] for i in group], outputs[-1])
            alive.append(arrays)
        tables = self._view._rotations(max(part.cache.length + len(part.ids) for part in parts))
        for layer, (cosine, sine) in zip(self._layers, tables, strict=True):
            layer.cosine, layer.sine = decoder._address(cosine), decoder._address(sine)
        arguments = (ctypes.byref(self._model), steps, len(groups), apart, self._team)
        floats = self._library.metapeft_serve_step(*arguments, None)
        if self._memory.size < floats:
            self._memory = np.empty(-(-floats // STEP) * STEP, np.float32)
        self._library.metapeft_serve_step(*arguments, decoder._address(self._memory))
        for group, found in zip(groups, outputs[1:], strict=False):
            begin = 0
            for i in group:
                logits[ends[i] - parts[i].wanted : ends[i]] = found[begin : begin + parts[i].wanted]
                begin += parts[i].wanted
        return logits

    def _fill(self, into: _Layer, layer: nn.Module) -> None:
        def named(value: mx.array) -> int:
            array = decoder._array(value)
            self._packed.append(_Packed(np.empty(0), FULL, alive=[array]))
            return decoder._address(array)

        attention = layer["self_attn"]
        into.norm_attention = named(layer["input_layernorm"]["weight"])
        into.norm_mlp = named(layer["post_attention_layernorm"]["weight"])
        if "q_norm" in attention:
            into.norm_q, into.norm_k = named(attention["q_norm"]["weight"]), named(attention["k_norm"]["weight"])
        for place, name in enumerate(LINEARS):
            base = decoder._base(layer[decoder._owner(name)][name])
            bias = decoder._array(base["bias"]) if "bias" in base else None
            into.linear[place] = self._matrix(decoder._array(base["weight"]), bias)

    def _matrix(self, weight: np.ndarray, bias: np.ndarray | None) -> _Matrix:
        packed, kind = pack(weight, 2 * self.lanes)
        self._packed.append(_Packed(packed, kind, bias))
        outputs, inputs = weight.shape
        given = None if bias is None else decoder._address(bias)
        return _Matrix(decoder._address(packed), given, inputs, outputs, kind)


class _Pace:
    """How long steps took per row, by their size and by whether threads computed apart."""

    AGAIN = 32  # steps until the slower way gets another chance

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, bool], float] = {}
        self._steps: dict[int, int] = {}

    def apart(self, rows: int) -> bool:
        size = rows.bit_length()
        known = [self._seconds.get((size, way)) for way in (False, True)]
        if known[0] is None or known[1] is None:
            return known[0] is not None
        return (known[1] < known[0]) != (self._steps[size] % self.AGAIN == 0)

    def took(self, rows: int, apart: bool, seconds: float) -> None:
        size = rows.bit_length()
        before = self._seconds.get((size, apart), seconds / rows)
        self._seconds[size, apart] = 0.7 * before + 0.3 * seconds / rows
        self._steps[size] = self._steps.get(size, 0) + 1


def _shared_out(parts: Sequence[Part], threads: int) -> list[list[int]]:
    """Parts in so many groups (or fewer) of about equal length."""
    groups: list[list[int]] = [[] for _ in range(min(threads, len(parts)))]
    lengths = [0] * len(groups)
    for i in sorted(range(len(parts)), key=lambda i: -len(parts[i].ids)):
        least = lengths.index(min(lengths))
        groups[least].append(i)
        lengths[least] += len(parts[i].ids)
    return groups


def _described(parts: Sequence[Part], logits: np.ndarray) -> tuple[_Step, list[Any]]:
    """As serve.cpp reads it, and what must stay alive meanwhile."""
    sequences = (_Sequence * len(parts))()
    chosen: list[int] = []
    begin = rank = 0
    for n, part in enumerate(parts):
        count, low = len(part.ids), part.adapter
        table = None if low is None or not low.rank else ctypes.addressof(low.table)
        memory = decoder._address(part.cache.memory)
        sequences[n] = _Sequence(table, memory, begin, count, part.cache.length, part.cache.capacity)
        chosen += range(begin + count - part.wanted, begin + count)
        rank = max(rank, low.rank if low is not None else 0)
        begin += count
    ids = np.array([id for part in parts for id in part.ids], dtype=np.int32)
    owners = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.ids) for part in parts])
    arrays = [ids, owners, np.array(chosen, dtype=np.int32), logits]
    addresses = [decoder._address(array) for array in arrays]
    step = _Step(ctypes.addressof(sequences), *addresses, len(ids), len(parts), len(chosen), rank)
    return step, [sequences, *arrays]


def pack(weight: np.ndarray, width: int) -> tuple[np.ndarray, int]:
    """(outputs, inputs) -> (strips, inputs, width), and the narrowest type that holds every weight exactly."""
    outputs, inputs = weight.shape
    narrow: np.ndarray = weight
    kind = FULL
    with np.errstate(over="ignore"):
        halves = weight.astype(np.float16)
    bits = weight.view(np.uint32)
    if np.array_equal(halves.astype(np.float32), weight):
        narrow, kind = halves, HALF
    elif not np.any(bits & 0xFFFF):
        narrow, kind = (bits >> 16).astype(np.uint16), BRAIN
    strips = -(-outputs // width)
    padded = np.zeros((strips * width, inputs), narrow.dtype)
    padded[:outputs] = narrow
    return np.ascontiguousarray(padded.reshape(strips, width, inputs).transpose(0, 2, 1)), kind


def native(model: nn.Module, threads: int | None = None) -> Native | None:
    """The model, packed for steps, if it is one that native code computes here (see the module's text)."""
    library, view = _library(), decoder.decoder(model)
    if library is None or view is None or view.window is not None:
        return None
    try:
        found = Native(view, library, threads or blas.usable_cores())
    except ValueError:
        return None
    return found if _agrees(found, model) else None


def _agrees(found: Native, model: nn.Module) -> bool:
    """Whether logits equal MLX's, for a prompt in two pieces."""
    ids = [(7 * i * i + 3 * i) % found.vocabulary for i in range(1, 25)]
    expected = np.array(run(model, mx.array([ids]))[0].astype(mx.float32))
    cache = found.cache(len(ids))
    logits = [found.step([Part(part, cache, wanted=len(part))]) for part in (ids[:20], ids[20:])]
    return bool(np.allclose(np.concatenate(logits), expected, rtol=1e-3, atol=1e-3))


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    try:
        library = blas.compiled(SOURCE, FLAGS)
    except OSError:
        return None  # the decoder's own message says how to get a compiler
    if not library.metapeft_serve_lanes():
        return None
    library.metapeft_serve_start.restype = _pointer
    library.metapeft_serve_start.argtypes = [_int]
    library.metapeft_serve_stop.restype = None
    library.metapeft_serve_stop.argtypes = [_pointer]
    library.metapeft_serve_step.restype = ctypes.c_size_t
    library.metapeft_serve_step.argtypes = [_pointer, _pointer, _int, _int, _pointer, _pointer]
    return library
