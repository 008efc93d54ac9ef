"""Writes small GGUF files, from the GGUF specification (ggml repository), independent of the reader under test.

Tensors are float32, or quantized in blocks of 32: Q4_1 (codes 0 to 15, scale and minimum) and Q8_0 (codes -127 to 127).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

ALIGNMENT = 32
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
F32, Q4_1, Q8_0 = 0, 3, 8


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[np.ndarray, int]]) -> None:
    """`tensors`: name -> (float32 matrix or vector, type). Python ints are written as uint32, lists of int as int32."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        header += _string(key) + _value(value)
    data = b""
    for name, (values, kind) in tensors.items():
        packed = PACK[kind](np.ascontiguousarray(values, dtype=np.float32))
        header += _string(name) + struct.pack("<I", values.ndim)
        header += struct.pack(f"<{values.ndim}Q", *reversed(values.shape)) + struct.pack("<IQ", kind, len(data))
        data += packed + b"\0" * (-len(packed) % ALIGNMENT)
    path.write_bytes(header + b"\0" * (-len(header) % ALIGNMENT) + data)


def rounded(values: np.ndarray, kind: int) -> np.ndarray:
    """What the written tensor stands for, exactly."""
    if kind == F32:
        return values.astype(np.float32)
    codes, scale, minimum = (_q4_1 if kind == Q4_1 else _q8_0)(values)
    return (codes * scale.astype(np.float32) + minimum.astype(np.float32)).reshape(values.shape).astype(np.float32)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order in which llama.cpp keeps q and k: each head's two halves interleaved."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    return struct.pack("<IIQ", ARRAY, INT32, len(value)) + struct.pack(f"<{len(value)}i", *value)


def _q4_1(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    blocks = values.reshape(-1, 32)
    minimum = blocks.min(1, keepdims=True).astype(np.float16)
    scale = ((blocks.max(1, keepdims=True) - blocks.min(1, keepdims=True)) / 15).astype(np.float16)
    return np.clip(np.rint((blocks - minimum) / scale), 0, 15), scale, minimum


def _q8_0(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    blocks = values.reshape(-1, 32)
    scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
    return np.clip(np.rint(blocks / scale), -127, 127), scale, np.zeros_like(scale)


def _pack_q4_1(values: np.ndarray) -> bytes:
    codes, scale, minimum = _q4_1(values)
    codes = codes.astype(np.uint8)
    nibbles = codes[:, :16] | codes[:, 16:] << 4  # the first half of a block in the low nibbles
    return np.concatenate([scale.view(np.uint8), minimum.view(np.uint8), nibbles], axis=1).tobytes()


def _pack_q8_0(values: np.ndarray) -> bytes:
    codes, scale, _ = _q8_0(values)
    return np.concatenate([scale.view(np.uint8), codes.astype(np.int8).view(np.uint8)], axis=1).tobytes()


PACK = {F32: np.ndarray.tobytes, Q4_1: _pack_q4_1, Q8_0: _pack_q8_0}
