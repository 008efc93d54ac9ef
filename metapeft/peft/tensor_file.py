"""safetensors bytes <-> named MLX arrays, with one clear sentence for a damaged file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, TensorSpec, deserialize, serialize

from metapeft.errors import UserError
from metapeft.runtime import mx
from metapeft.settings import brief

_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def encode(tensors: Mapping[str, mx.array]) -> bytes:
    """A safetensors file. The same tensors give the same bytes, whatever their order."""
    alive = {}  # the specifications below point into these
    for name in sorted(tensors):
        value = tensors[name]
        kind = "bfloat16" if value.dtype == mx.bfloat16 else str(value.dtype).removeprefix("mlx.core.")
        alive[name] = (kind, np.ascontiguousarray(np.array(value.view(mx.uint16) if kind == "bfloat16" else value)))
    specs = {
        name: TensorSpec(dtype=kind, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes)
        for name, (kind, array) in alive.items()
    }
    return bytes(serialize(specs, metadata={"format": "pt"}))


def decode(content: bytes, path: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file (`path` only names it in errors); float64 becomes float32."""
    try:
        entries = deserialize(content)
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({brief(error)}); copy or save the adapter again"
        ) from error
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in _NUMPY:
            raise UserError(f"{path} holds {name} as {entry['dtype']}; metapeft reads float32, float16 and bfloat16")
        array = np.frombuffer(entry["data"], dtype=_NUMPY[entry["dtype"]]).reshape(entry["shape"])
        value = mx.array(array.astype(np.float32) if entry["dtype"] == "F64" else array)
        tensors[name] = value.view(mx.bfloat16) if entry["dtype"] == "BF16" else value
    return tensors
