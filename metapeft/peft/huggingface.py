"""The Hugging Face PEFT adapter format, as PEFT 0.21 writes and reads it, for all five methods.

PEFT finds the adapted modules by matching names and patterns in its configuration against the model. Reading goes the
other way: the tensors say exactly which modules are adapted, the configuration only adds their scale.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metapeft.errors import UserError
from metapeft.peft import tensor_file
from metapeft.peft.adalora import AdaLoRAConfig
from metapeft.peft.base import MethodConfig
from metapeft.peft.lora import LoRAConfig, pattern
from metapeft.peft.p_tuning import PTuningConfig
from metapeft.peft.prefix import PrefixConfig
from metapeft.peft.prompt import PromptConfig
from metapeft.peft.saved import ROOT, Saved, layer_of, renamed, within_layer
from metapeft.runtime import mx
from metapeft.settings import brief

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_TYPES = {
    "LORA": "lora",
    "ADALORA": "adalora",
    "PROMPT_TUNING": "prompt",
    "PREFIX_TUNING": "prefix",
    "P_TUNING": "p_tuning",
}
_INITIALISATIONS = {"TEXT": "text", "SAMPLE_VOCAB": "vocabulary", "RANDOM": "random"}

# Options of PEFT that change what an adapter computes and have no counterpart here, with the value that turns each off.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    **{
        name: (None, False, {}, [])
        for name in (
            "use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "layer_replication",
            "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config",
            "monteclora_config", "velora_config", "loftq_config", "corda_config", "lora_ga_config",
        )
    },
}  # fmt: skip
# Initialisations that also change the base weights: without those the adapter means nothing.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


# Writing


def encode(saved: Saved) -> dict[str, bytes]:
    """The two files of a PEFT adapter folder, by name; modules are called what Hugging Face's models call them."""
    saved = renamed(saved, {path: theirs(path) for path in saved.modules()})
    tensors = trimmed(saved) if isinstance(saved.config, AdaLoRAConfig) else saved.tensors
    config = json.dumps(to_json(saved), indent=2, sort_keys=True)
    return {WEIGHTS: tensor_file.encode(tensors), CONFIG: config.encode()}


def theirs(path: str) -> str:
    """What Hugging Face's implementation calls a module: the layers of GPT-2 and GPT-J are `model.h` in mlx-lm."""
    return f"transformer.h.{path.removeprefix('model.h.')}" if path.startswith("model.h.") else path


def to_json(saved: Saved) -> dict[str, Any]:
    """adapter_config.json: the keys that mean something; PEFT fills in its defaults for the rest."""
    common = {
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": saved.metadata.get("backbone") or None,
    }
    config = saved.config
    if isinstance(config, LoRAConfig):
        return common | _lora_json(config, saved)
    if isinstance(config, AdaLoRAConfig):
        return common | _adalora_json(config, saved)
    return common | _virtual_json(config, saved)


def _lora_json(config: LoRAConfig, saved: Saved) -> dict[str, Any]:
    modules = saved.modules()
    ranks = {path: int(parts["A"].shape[0]) for path, parts in modules.items()}
    alphas = {path: pattern(config.alpha_pattern, path, config.alpha) for path in modules}
    return {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": _number(config.alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "rank_pattern": {path: rank for path, rank in ranks.items() if rank != config.rank},
        "alpha_pattern": {path: _number(alpha) for path, alpha in alphas.items() if alpha != config.alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    } | _targets_json(config, list(modules))


def _adalora_json(config: AdaLoRAConfig, saved: Saved) -> dict[str, Any]:
    # PEFT refuses a configuration without a budgeting phase, so a schedule too short for one is shortened at its ends.
    total = int(saved.metadata.get("steps") or 1000)
    final = min(round(config.final_fraction * total), total - 1)
    initial = min(round(config.initial_fraction * total), total - final - 1)
    modules = saved.modules()
    masks = {path: saved.rank_pattern.get(path) or _mask(parts, config.initial_rank) for path, parts in modules.items()}
    pruned = saved.rank_pattern or any(not all(mask) for mask in masks.values())
    return {
        "peft_type": "ADALORA",
        "init_r": config.initial_rank,
        "target_r": config.target_rank,
        "lora_alpha": _number(config.alpha),
        "lora_dropout": config.dropout,
        "tinit": initial,
        "tfinal": final,
        "deltaT": config.interval,
        "total_step": total,
        "beta1": config.beta1,
        "beta2": config.beta2,
        "orth_reg_weight": config.orthogonality,
        "rank_pattern": {f"{path}.lora_E": masks[path] for path in sorted(masks)} if pruned else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    } | _targets_json(config, list(modules))


def _virtual_json(config: MethodConfig, saved: Saved) -> dict[str, Any]:
    table = saved.tensors["prompt_embeddings"]
    common: dict[str, Any] = {"num_virtual_tokens": int(table.shape[0]), "num_transformer_submodules": 1}
    if isinstance(config, PrefixConfig):
        layers, heads = int(saved.metadata["layers"]), int(saved.metadata["kv_heads"])
        return common | {
            "peft_type": "PREFIX_TUNING",
            "token_dim": int(table.shape[1]) // (2 * layers),
            "num_layers": layers,
            "num_attention_heads": heads,
            "prefix_projection": config.projection > 0,
            "encoder_hidden_size": config.projection or None,
        }
    common |= {"token_dim": int(table.shape[1]), "num_layers": saved.metadata.get("layers")}
    if isinstance(config, PromptConfig):
        # The start of training is past. PEFT would ask for a tokenizer if it were told that it was a text.
        return common | {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
    assert isinstance(config, PTuningConfig)
    return common | {
        "peft_type": "P_TUNING",
        "encoder_reparameterization_type": config.encoder.upper(),
        "encoder_hidden_size": config.width,
        "encoder_num_layers": 2,
        "encoder_dropout": 0.0,
    }


def _targets_json(config: LoRAConfig | AdaLoRAConfig, paths: list[str]) -> dict[str, Any]:
    """`target_modules` by name where names say exactly which modules are adapted, else every whole path."""
    by_layer: dict[int | None, set[str]] = {}
    for path in paths:
        by_layer.setdefault(layer_of(path), set()).add(within_layer(path))
    uniform = None not in by_layer and len({frozenset(names) for names in by_layer.values()}) == 1
    if uniform and not any(target in paths for target in config.targets):
        names = set(config.targets) or {path.rsplit(".", 1)[-1] for path in paths}
        layers = sorted(layer for layer in by_layer if layer is not None)
        return {"target_modules": sorted(names), "layers_to_transform": layers if config.layers else None}
    return {"target_modules": sorted(paths), "layers_to_transform": None}


def _mask(parts: Mapping[str, mx.array], initial_rank: int) -> list[bool]:
    """A pattern for matrices already trimmed: which ranks they were is no longer known, how many is."""
    kept = int(parts["E"].shape[0])
    return [index < kept for index in range(max(initial_rank, kept))]


def trimmed(saved: Saved) -> dict[str, mx.array]:
    """AdaLoRA's tensors without the ranks that are out of force."""
    result = dict(saved.tensors)
    for path, parts in saved.modules().items():
        mask = saved.rank_pattern.get(path)
        if mask is None or parts["E"].shape[0] == sum(mask):
            continue
        kept = mx.array([index for index, keep in enumerate(mask) if keep], dtype=mx.int32)
        result |= {f"{ROOT}{path}.lora_{part}": mx.take(parts[part], kept, axis=part == "B") for part in "AEB"}
    return result


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


# Reading


def decode(files: Mapping[str, bytes], folder: Path) -> Saved:
    """An adapter from the two files of a PEFT folder (`folder` only names it in errors).

    Raises UserError when a file is damaged, when the two do not fit together, or when the adapter uses something that
    cannot be computed here.
    """
    path = folder / CONFIG
    config = parse_json(files[CONFIG], path)
    method = _TYPES.get(str(config.get("peft_type")))
    if method is None:
        raise UserError(
            f"{path}: peft_type {brief(repr(config.get('peft_type')), 60)} is not supported;"
            f" metapeft reads {', '.join(_TYPES)}"
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(
            f"{path}: task_type {brief(config['task_type'], 60)} is not supported; metapeft reads CAUSAL_LM adapters"
        )
    tensors = tensor_file.decode(files[WEIGHTS], folder / WEIGHTS)
    try:
        if method in ("lora", "adalora"):
            _check_options(config, path)
            return _decode_matrices(method, config, tensors, folder)
        return _decode_virtual(method, config, tensors, folder)
    except KeyError as error:
        raise UserError(f"{path} has no {error.args[0]!r}; it is not a whole PEFT configuration") from error
    except (TypeError, ValueError, ArithmeticError, AttributeError, RecursionError, re.error) as error:
        raise UserError(f"{path} holds a wrong value ({brief(error)}); it is not a PEFT configuration") from error


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError naming the file."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({brief(error)}); copy or save the adapter again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _check_options(config: dict[str, Any], path: Path) -> None:
    for name, value in config.items():
        unknown_switch = name.startswith("use_") and name != "use_rslora" and value
        if unknown_switch or (name in _UNSUPPORTED and value not in _UNSUPPORTED[name]):
            raise UserError(
                f"{path}: {brief(name, 60)}={brief(repr(value), 60)} is not supported;"
                " merge this adapter with PEFT instead"
            )
    if str(config.get("init_lora_weights")).lower().startswith(_CHANGED_BASE):
        raise UserError(
            f"{path}: init_lora_weights={brief(config['init_lora_weights'], 60)!r} changes the base model;"
            " convert the adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…) first"
        )


def _decode_matrices(method: str, config: dict[str, Any], tensors: dict[str, mx.array], folder: Path) -> Saved:
    weights = folder / WEIGHTS
    parts = ("A", "B") if method == "lora" else ("A", "E", "B")
    suffix = ".weight" if method == "lora" else ""
    name = re.compile(rf"{re.escape(ROOT)}(.+)\.lora_([{''.join(parts)}]){re.escape(suffix)}")
    found: dict[str, dict[str, mx.array]] = {}
    for key, value in tensors.items():
        match = name.fullmatch(key)
        if match is None:
            raise UserError(f"{weights} holds {brief(key, 90)}, which is not a {method} matrix that metapeft knows")
        if value.ndim != 2:
            raise UserError(f"{weights}: {key} has shape {list(value.shape)}; it must be a matrix")
        found.setdefault(match[1], {})[match[2]] = value
    if not found:
        raise UserError(f"{weights} holds no tensors; the adapter is empty")
    for path, matrices in found.items():
        if missing := [part for part in parts if part not in matrices]:
            raise UserError(f"{weights}: {path} has no lora_{missing[0]}; the file is incomplete")
        ranks = {matrices["A"].shape[0], matrices["B"].shape[1], *([matrices["E"].shape[0]] if "E" in matrices else [])}
        if len(ranks) > 1 or ("E" in matrices and matrices["E"].shape[1] != 1):
            shapes = ", ".join(f"lora_{part} {list(matrices[part].shape)}" for part in parts)
            raise UserError(f"{weights}: the matrices of {path} do not fit together ({shapes})")
    decoded = _lora_config if method == "lora" else _adalora_config
    read, metadata, masks = decoded(config, found, folder)
    if config.get("base_model_name_or_path"):
        metadata["backbone"] = config["base_model_name_or_path"]
    return Saved(read, tensors, metadata, "peft", masks)


def _lora_config(
    config: dict[str, Any], modules: dict[str, dict[str, mx.array]], folder: Path
) -> tuple[MethodConfig, dict[str, Any], dict[str, list[bool]]]:
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    rank_pattern, alpha_pattern = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, matrices in modules.items():
        expected, actual = int(_first_match(rank_pattern, path, rank)), int(matrices["A"].shape[0])
        if expected != actual:
            raise UserError(
                f"{folder / WEIGHTS}: {path} has rank {actual} and {CONFIG} says {expected}; the files do not match"
            )
        if actual != rank:
            ranks[path] = actual
        if (own := float(_first_match(alpha_pattern, path, alpha))) != alpha:
            alphas[path] = own
    read = LoRAConfig(
        rank=rank,
        alpha=alpha,
        dropout=probability(config.get("lora_dropout", 0.0), folder / CONFIG),
        targets=_targets(config, modules),
        rslora=bool(config.get("use_rslora", False)),
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    return read, {}, {}


def _adalora_config(
    config: dict[str, Any], modules: dict[str, dict[str, mx.array]], folder: Path
) -> tuple[MethodConfig, dict[str, Any], dict[str, list[bool]]]:
    total, initial_rank = int(config["total_step"]), int(config["init_r"])
    if config["lora_alpha"] <= 0 or total <= 0:
        raise UserError(f"{folder / CONFIG}: lora_alpha and total_step must be above 0")
    masks: dict[str, list[bool]] = {}
    for name, mask in (config.get("rank_pattern") or {}).items():
        masks[name.split(".lora_E")[0]] = [bool(keep) for keep in mask]
    for path, matrices in modules.items():
        expected, actual = sum(masks[path]) if path in masks else initial_rank, int(matrices["A"].shape[0])
        if expected != actual:
            raise UserError(
                f"{folder / WEIGHTS}: {path} has rank {actual} and {CONFIG} says {expected}; the files do not match"
            )
    read = AdaLoRAConfig(
        initial_rank=initial_rank,
        target_rank=int(config["target_r"]),
        alpha=float(config["lora_alpha"]),
        dropout=probability(config.get("lora_dropout", 0.0), folder / CONFIG),
        targets=_targets(config, modules),
        beta1=float(config.get("beta1", 0.85)),
        beta2=float(config.get("beta2", 0.85)),
        initial_fraction=int(config.get("tinit", 0)) / total,
        final_fraction=int(config.get("tfinal", 0)) / total,
        interval=int(config.get("deltaT", 1)),
        orthogonality=float(config.get("orth_reg_weight", 0.5)),
    )
    return read, {"steps": total}, masks


def probability(value: Any, path: Path) -> float:
    """A dropout that a configuration file names. Raises UserError when it is none."""
    found = float(value)
    if not 0 <= found < 1:
        raise UserError(f"{path}: dropout {found:g} is not in [0, 1); it is not what training wrote")
    return found


def _first_match(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """PEFT's own rule: the first key that matches the path's end as a regular expression."""
    return next((value for key, value in patterns.items() if _fits(key, path)), default)


def _fits(key: str, path: str) -> bool:
    """Whether a pattern fits a module's path. Raises ValueError for one that could take for ever (repeated repeats)."""
    if re.fullmatch(r"[\w.]*", key):  # what PEFT itself writes
        return re.match(rf"(.*\.)?({key})$", path) is not None
    if len(re.findall(r"[*+{?]", key)) > 3 or re.search(r"\)\s*[*+{?]", key) or max(len(key), len(path)) > 500:
        raise ValueError(f"the pattern {key[:60]!r} is too complicated: name the modules")
    return re.match(rf"(.*\.)?({key})$", path) is not None


def _targets(config: dict[str, Any], paths: Mapping[str, Any]) -> tuple[str, ...]:
    """The names PEFT was given, or the adapted paths where it was given more than names."""
    names = config.get("target_modules")
    everywhere = not config.get("exclude_modules") and config.get("layers_to_transform") is None
    return tuple(sorted(names if isinstance(names, list) and everywhere else paths))


def _decode_virtual(method: str, config: dict[str, Any], tensors: dict[str, mx.array], folder: Path) -> Saved:
    weights = folder / WEIGHTS
    if set(tensors) != {"prompt_embeddings"}:
        found = ", ".join(sorted(tensors)) or "nothing"
        raise UserError(f"{weights} must hold one tensor, prompt_embeddings, and holds {brief(found)}")
    if config.get("num_transformer_submodules", 1) not in (None, 1):
        raise UserError(
            f"{folder / CONFIG}: encoder-decoder models are not supported (num_transformer_submodules is not 1)"
        )
    tokens, width = int(config["num_virtual_tokens"]), config.get("token_dim")
    layers, heads = config.get("num_layers"), config.get("num_attention_heads")
    metadata: dict[str, Any] = {}
    if method == "prefix":
        width, layers, heads = (int(value or 0) for value in (width, layers, heads))
        if min(width, layers, heads) < 1:
            raise UserError(
                f"{folder / CONFIG}: token_dim, num_layers and num_attention_heads are needed for prefix tuning"
            )
        width *= 2 * layers
        metadata["kv_heads"] = heads
    table = tensors["prompt_embeddings"]
    if table.ndim != 2 or table.shape[0] != tokens or (width and table.shape[1] != int(width)):
        expected = [tokens, int(width) if width else "width"]
        raise UserError(f"{weights}: prompt_embeddings has shape {list(table.shape)} and {CONFIG} says {expected}")
    if layers:
        metadata["layers"] = int(layers)
    if config.get("base_model_name_or_path"):
        metadata["backbone"] = config["base_model_name_or_path"]
    return Saved(_virtual_config(method, config, tokens), tensors, metadata, "peft")


def _virtual_config(method: str, config: dict[str, Any], tokens: int) -> MethodConfig:
    if method == "prompt":
        start = _INITIALISATIONS[str(config.get("prompt_tuning_init", "RANDOM"))]
        return PromptConfig(tokens, start, config.get("prompt_tuning_init_text") or "")  # type: ignore[arg-type]
    if method == "prefix":
        projection = int(config.get("encoder_hidden_size") or 0) if config.get("prefix_projection") else 0
        return PrefixConfig(tokens, "random", "", projection)
    encoder = str(config.get("encoder_reparameterization_type", "MLP")).lower()
    return PTuningConfig(tokens, encoder, int(config.get("encoder_hidden_size") or 128))  # type: ignore[arg-type]
