"""A GGUF file written from the specification becomes the same model as the folder its weights came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from metapeft.backbones import gguf, load
from metapeft.errors import UserError
from metapeft.runtime import mx
from tests.backbones import gguf_file
from tests.backbones.gguf_file import F32, Q4_1, Q8_0
from tests.backbones.tiny import tiny_folder

HEADS, KV_HEADS = 4, 2
TOKENS = ["<|pad|>", "<|start|>", "<|end|>", *"abcdefgh", "Ġ", "Ċ", "1", "2", "ab", "Ġab", "12", "<|tool|>"]


def metadata(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 128,
        "llama.block_count": 4,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.context_length": 512,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*TOKENS, *(f"<unused{i}>" for i in range(264 - len(TOKENS)))],
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * (len(TOKENS) - 4), 4, *[5] * (264 - len(TOKENS))],
        "tokenizer.ggml.merges": ["a b", "Ġ ab", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    values.update({key.replace("__", "."): value for key, value in changes.items()})
    return {key: value for key, value in values.items() if value is not None}


def tensors(kinds: dict[str, int]) -> tuple[dict[str, tuple[np.ndarray, int]], dict[str, np.ndarray]]:
    """(what to write, what it stands for under the model's own names), from a small random llama."""
    names = {**{value: key for key, value in gguf.NAMES.items()}}
    written, meant = {}, {}
    for name, values in load_file(tiny_folder("llama") / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            short = f"blk.{layer}.{names[part]}"
        else:
            short = names[stem]
        kind = kinds.get(short.rpartition(".")[2], kinds["else"]) if values.ndim == 2 else F32
        meant[name] = gguf_file.rounded(values, kind)
        if short.endswith("attn_q"):
            values = gguf_file.permuted(values, HEADS)
        if short.endswith("attn_k"):
            values = gguf_file.permuted(values, KV_HEADS)
        written[f"{short}.weight"] = (values, kind)
    return written, meant


@pytest.mark.parametrize("kinds", [{"else": F32}, {"else": Q4_1, "token_embd": Q8_0}])
def test_weights_come_back(tmp_path: Path, kinds: dict[str, int]) -> None:
    """Including those of the rotary projections, which GGUF keeps in another order. Off by float16 rounding only."""
    written, meant = tensors(kinds)
    gguf_file.write(tmp_path / "m.gguf", metadata(), written)
    gguf.convert(tmp_path / "m.gguf", tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == set(meant)
    for name, values in meant.items():
        assert found[name].dtype == np.float16
        np.testing.assert_allclose(found[name].astype(np.float32), values, rtol=2**-11, atol=1e-6, err_msg=name)


def test_the_model_computes_the_same(tmp_path: Path) -> None:
    written, _ = tensors({"else": F32})
    gguf_file.write(tmp_path / "m.gguf", metadata(), written)
    gguf.convert(tmp_path / "m.gguf", tmp_path)
    (tmp_path / "m.gguf").unlink()
    ids = mx.array([[5, 9, 200, 31, 77, 8]])
    expected = load(str(tiny_folder("llama"))).model(ids)
    got = load(str(tmp_path)).model(ids)
    np.testing.assert_allclose(np.array(got), np.array(expected), atol=0.02)


def test_the_config_is_read_from_the_file(tmp_path: Path) -> None:
    changes = {"llama__rope__freq_base": 50000.0, "llama__context_length": 2048}
    gguf_file.write(tmp_path / "m.gguf", metadata(**changes), tensors({"else": F32})[0])
    gguf.convert(tmp_path / "m.gguf", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["rope_theta"], config["max_position_embeddings"], config["rms_norm_eps"]) == (50000, 2048, 1e-5)
    assert (config["hidden_size"], config["head_dim"], config["num_key_value_heads"]) == (64, 16, 2)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)


def test_tied_embeddings(tmp_path: Path) -> None:
    written, _ = tensors({"else": F32})
    del written["output.weight"]
    gguf_file.write(tmp_path / "m.gguf", metadata(), written)
    gguf.convert(tmp_path / "m.gguf", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True
    assert load(str(tmp_path)).context_length == 512


def test_the_same_file_gives_the_same_bytes(tmp_path: Path) -> None:
    gguf_file.write(tmp_path / "m.gguf", metadata(), tensors({"else": Q4_1})[0])
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        gguf.convert(tmp_path / "m.gguf", tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(("pre", "number"), [("smollm", ["1", "2"]), ("gpt-2", ["12"])])
def test_tokenizer_follows_the_files_pre_tokenizer(tmp_path: Path, pre: str, number: list[str]) -> None:
    gguf_file.write(tmp_path / "m.gguf", metadata(**{"tokenizer__ggml__pre": pre}), tensors({"else": F32})[0])
    gguf.convert(tmp_path / "m.gguf", tmp_path)
    tokenizer = load(str(tmp_path)).tokenizer
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("ab ab12<|end|><|tool|>\n"))
    assert pieces == ["ab", "Ġab", *number, "<|end|>", "<|tool|>", "Ċ"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|start|>", "<|end|>", "<|pad|>")
    assert tokenizer.decode(tokenizer.encode("ab<|end|><|tool|>"), skip_special_tokens=True) == "ab<|tool|>"
    assert tokenizer.eos_token_ids == {2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": "mamba"}, "holds a mamba model; only the llama family"),
        ({"tokenizer__ggml__model": "llama"}, "has a llama/smollm vocabulary; only byte-level BPE"),
        ({"tokenizer__ggml__pre": "qwen2"}, "has a gpt2/qwen2 vocabulary"),
        ({"llama__rope__freq_base": None}, "has no llama.rope.freq_base; it is not a complete GGUF model"),
        ({"tokenizer__ggml__merges": None}, "has no tokenizer.ggml.merges"),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    gguf_file.write(tmp_path / "m.gguf", metadata(**changes), tensors({"else": F32})[0])
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=message):
        gguf.convert(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all", "cut"])
def test_a_damaged_file_is_an_error(tmp_path: Path, content: bytes | str) -> None:
    file = tmp_path / "m.gguf"
    gguf_file.write(file, metadata(), tensors({"else": F32})[0])
    file.write_bytes(file.read_bytes()[:2000] if isinstance(content, str) else content)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"m\.gguf"):
        gguf.convert(file, tmp_path / "out")
