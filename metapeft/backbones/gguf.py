"""A GGUF file of the llama family -> an ordinary MLX (and Hugging Face) model folder.

Formats: the GGUF specification in the ggml repository; llama.cpp's `convert_hf_to_gguf.py` for the order of the rotary
projections. Weights are stored as float16: the nearest to `scale * q + bias` in at most 2^-11 relative, while the 4-bit
code itself is off by up to 1/30 of its group's range. Computing happens in whatever precision the reader casts to.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

from metapeft.errors import UserError
from metapeft.settings import brief

VERSION = 1  # raise it when the folder written here changes: cached ones are then rebuilt

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# How each pre-tokenizer that GGUF names splits a text before the merges: "smollm" takes digits one by one.
DIGITS = {"smollm": True, "gpt-2": False}
CONTROL, USER_DEFINED = 3, 4  # GGUF token types that are matched whole, before the merges


def convert(file: Path, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files into `folder`.

    Raises UserError when the file is not a readable GGUF of the llama family with a byte-level BPE vocabulary.
    """
    from metapeft.runtime import mx

    try:
        loaded: Any = mx.load(str(file), format="gguf", return_metadata=True)
        weights, metadata = loaded
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{file} is not a readable GGUF file ({brief(error)}); download it again") from error
    read = _Metadata(file, metadata)
    if (architecture := read.text("general.architecture")) != "llama":
        raise UserError(f"{file} holds a {architecture} model; only the llama family can be converted from GGUF")
    if (kind := read.text("tokenizer.ggml.model")) != "gpt2" or read.text("tokenizer.ggml.pre") not in DIGITS:
        pre = read.text("tokenizer.ggml.pre")
        raise UserError(
            f"{file} has a {kind}/{pre} vocabulary; only byte-level BPE ({', '.join(DIGITS)}) can be converted"
        )
    config = _config(read, tied="output.weight" not in weights)
    tensors = _weights(weights, config["num_attention_heads"], config["num_key_value_heads"])
    try:
        mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    except RuntimeError as error:  # MLX does not say why
        raise OSError(errno.EIO, "the disk is full or cannot be written", str(folder)) from error
    _write(folder / "config.json", config)
    _tokenizer(read, folder)


class _Metadata:
    """GGUF key-value pairs as plain Python values."""

    def __init__(self, file: Path, values: dict[str, Any]):
        self.file = file
        self.values = values

    def get(self, key: str) -> Any:
        if key not in self.values:
            raise UserError(f"{self.file} has no {key}; it is not a complete GGUF model")
        value = self.values[key]
        return value.tolist() if hasattr(value, "tolist") else value

    def text(self, key: str) -> str:
        return str(self.get(key))


def _config(read: _Metadata, tied: bool) -> dict[str, Any]:
    heads = read.get("llama.attention.head_count")
    width = read.get("llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": read.get("llama.feed_forward_length"),
        "num_hidden_layers": read.get("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read.get("llama.attention.head_count_kv"),
        "head_dim": width // heads,
        "max_position_embeddings": read.get("llama.context_length"),
        "rms_norm_eps": float(f"{read.get('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": read.get("llama.rope.freq_base"),
        "vocab_size": len(read.get("tokenizer.ggml.tokens")),
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": read.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": read.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": read.get("tokenizer.ggml.padding_token_id"),
        "dtype": "float16",
    }


def _weights(weights: dict[str, Any], heads: int, kv_heads: int) -> dict[str, Any]:
    """Dequantized, renamed, and with the rotary projections back in the half-split order that MLX rotates."""
    from metapeft.runtime import mx

    tensors = {}
    for key in sorted(weights):
        name, _, kind = key.rpartition(".")
        if kind != "weight":
            continue  # scales and biases go with their weight
        value = weights[key]
        if (scales := weights.get(f"{name}.scales")) is not None:
            groups = scales.astype(mx.float32), weights[f"{name}.biases"].astype(mx.float32)
            columns = scales.shape[-1] * 32  # every GGUF format that MLX reads has groups of 32
            value = mx.dequantize(value, *groups, group_size=32, bits=value.shape[-1] * 32 // columns)
        if name.endswith(("attn_q", "attn_k")):
            value = _unpermute(value, heads if name.endswith("attn_q") else kv_heads)
        tensors[f"{_rename(name)}.weight"] = value.astype(mx.float16)
    return tensors


def _unpermute(weight: Any, heads: int) -> Any:
    """llama.cpp interleaves the two halves of each head's rotary pairs: (heads, pairs, 2) back to (heads, 2, pairs)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _rename(name: str) -> str:
    if name.startswith("blk."):
        _, layer, part = name.split(".", 2)
        return f"model.layers.{layer}.{NAMES[part]}"
    return NAMES[name]


def _tokenizer(read: _Metadata, folder: Path) -> None:
    """The byte-level BPE tokenizer of the file, as tokenizer.json, with its special tokens and chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = read.get("tokenizer.ggml.tokens")
    kinds = read.get("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in read.get("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if DIGITS[read.text("tokenizer.ggml.pre")]:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    whole = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in whole])
    extra = [token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in extra])
    tokenizer.save(str(folder / "tokenizer.json"))

    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {key: tokens[read.get(f"tokenizer.ggml.{short}_token_id")] for key, short in named.items()}
    settings = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": read.get("llama.context_length"),
    }
    _write(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(read.text("tokenizer.chat_template"), encoding="utf-8")


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
