"""Small random models of many architectures, as real folders that mlx-lm and `metapeft.backbones.load` read.

Hidden 64, 4 layers, a byte-level tokenizer of 256 bytes and four special tokens. Equal arguments give equal weights.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from metapeft.backbones import Backbone, load
from metapeft.runtime import mx, nn

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
VOCABULARY = 264  # 256 bytes, the special tokens, and four ids that nothing produces
CONTEXT = 512
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "eos_token_id": 258,
    "bos_token_id": 257,
    "pad_token_id": 259,
}
GEMMA = {"query_pre_attn_scalar": 16, "tie_word_embeddings": True}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {**GEMMA, "sliding_window": 16, "sliding_window_pattern": 2, "rope_local_base_freq": 10000.0},
    "phi3": {"partial_rotary_factor": 1.0, "original_max_position_embeddings": CONTEXT},
    "smollm3": {"no_rope_layer_interval": 2},
    "qwen3_moe": {**EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "olmoe": EXPERTS,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
ARCHITECTURES = tuple(name for name in CONFIGS if name not in ("olmoe", "mixtral"))  # one mixture of experts is enough
CONFIGS |= {  # each unlike all others in one way
    "gpt2": {"n_ctx": 64, "n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 64, "layer_norm_epsilon": 1e-5,
             "max_position_embeddings": 64},  # positions are a table
    "minicpm3": {"dim_model_base": 64, "scale_depth": 1.0, "scale_emb": 1, "qk_nope_head_dim": 16,
                 "qk_rope_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "num_key_value_heads": 4,
                 "v_head_dim": 12,  # keys are not shaped like values
                 "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4,
                                  "original_max_position_embeddings": CONTEXT}},
    "granitemoehybrid": {"attention_bias": False, "embedding_multiplier": 1.0, "attention_multiplier": 0.25,
                         "logits_scaling": 1.0, "residual_multiplier": 1.0,
                         "layer_types": ["mamba", "attention", "mamba", "attention"], "mamba_n_heads": 8,
                         "mamba_d_head": 16, "mamba_proj_bias": False, "mamba_d_state": 16, "mamba_d_conv": 4,
                         "mamba_n_groups": 1, "mamba_conv_bias": True},  # half of the layers do not attend
}  # fmt: skip


def tiny(model_type: str, seed: int = 0, quantized: bool = False) -> Backbone:
    """A fresh small random backbone; `quantized`: 4 bits in groups of 32, and left so."""
    return load(str(tiny_folder(model_type, seed, quantized)), dequantize=False)


@functools.cache
def tiny_folder(model_type: str, seed: int = 0, quantized: bool = False) -> Path:
    """The same as a model folder, removed when the process ends. Do not change it: copy it."""
    folder = Path(tempfile.mkdtemp(prefix="metapeft-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write(folder, model_type, seed, quantized)
    return folder


def write(folder: Path, model_type: str, seed: int = 0, quantized: bool = False) -> None:
    """Write config.json, model.safetensors and the tokenizer of a small random model into an existing folder."""
    from mlx.utils import tree_flatten, tree_map_with_path
    from mlx_lm.utils import _get_classes

    config = {"model_type": model_type, **COMMON, **CONFIGS[model_type]}
    model_class, arguments = _get_classes(config)
    mx.random.seed(seed)
    model = model_class(arguments.from_dict(config))

    def randomize(name: str, value: mx.array) -> mx.array:
        if value.ndim == 1:  # norms near one (or zero where the architecture adds one), biases near zero
            return value + 0.05 * mx.random.normal(value.shape)
        return mx.random.normal(value.shape) * (0.3 if "embed" in name else 0.12)

    model.update(tree_map_with_path(randomize, model.parameters()))
    if quantized:
        nn.quantize(model, group_size=32, bits=4)
        config["quantization"] = {"group_size": 32, "bits": 4}
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    _tokenizer(folder)


def _tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[3],
        "unk_token": SPECIAL[0],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
