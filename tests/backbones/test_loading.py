from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx_lm
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from metapeft.backbones import Backbone, fetch, identity, load, loading
from metapeft.errors import UserError
from metapeft.runtime import mx, tree_flatten
from tests.backbones.hub import hub
from tests.backbones.tiny import ARCHITECTURES, CONTEXT, tiny, tiny_folder, write

ROOT = Path(__file__).resolve().parents[2]
IDS = [[5, 250, 31, 77, 8, 140, 2]]


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "model"))


def logits(backbone: Backbone) -> np.ndarray:
    return np.array(backbone.model(mx.array(IDS)).astype(mx.float32))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_computes_what_mlx_lm_computes(model_type: str, quantized: bool) -> None:
    """In float32, dequantized where it was quantized, and frozen."""
    folder = tiny_folder(model_type, quantized=quantized)
    backbone = load(str(folder), dequantize=True)
    reference, _ = mlx_lm.load(str(folder))
    np.testing.assert_allclose(logits(backbone), np.array(reference(mx.array(IDS))), atol=2e-3)
    assert {value.dtype for _, value in tree_flatten(backbone.model.parameters())} == {mx.float32}
    assert tree_flatten(backbone.model.trainable_parameters()) == []
    assert not backbone.model.training
    assert (backbone.id, backbone.path, backbone.context_length) == (str(folder), folder, CONTEXT)


def test_dequantized_by_default_on_a_cpu_only() -> None:
    folder = str(tiny_folder("llama", quantized=True))
    kept = dict(tree_flatten(load(folder, dequantize=False).model.parameters()))
    default = dict(tree_flatten(load(folder).model.parameters()))
    assert any(name.endswith("scales") for name in kept)
    assert any(name.endswith("scales") for name in default) == (loading.device() != "cpu")


def test_dequantized_from_half_precision_scales_without_rounding_again(tmp_path: Path) -> None:
    """scale * code + bias in float32, although mx.dequantize works in the scales' own float16."""
    folder = copy(tiny_folder("llama", quantized=True), tmp_path)
    stored = load_file(folder / "model.safetensors")
    halves = {k: v.astype(np.float16) if k.endswith(("scales", "biases")) else v for k, v in stored.items()}
    save_file(halves, folder / "model.safetensors")
    weight = dict(tree_flatten(load(str(folder), dequantize=True).model.parameters()))["model.embed_tokens.weight"]
    packed = halves["model.embed_tokens.weight"]
    codes = (packed[..., None] >> (4 * np.arange(8, dtype=np.uint32)) & 15).reshape(packed.shape[0], -1, 32)
    scales, biases = (halves[f"model.embed_tokens.{name}"].astype(np.float32) for name in ("scales", "biases"))
    exact = (codes * scales[..., None] + biases[..., None]).reshape(packed.shape[0], -1)
    np.testing.assert_allclose(np.array(weight), exact, rtol=1e-6, atol=1e-7)


def test_half_precision_becomes_float32_on_a_cpu(tmp_path: Path) -> None:
    folder = copy(tiny_folder("qwen3"), tmp_path)
    stored = mx.load(str(folder / "model.safetensors"))
    mx.save_safetensors(str(folder / "model.safetensors"), {k: v.astype(mx.bfloat16) for k, v in stored.items()})
    types = {value.dtype for _, value in tree_flatten(load(str(folder)).model.parameters())}
    assert types == {mx.float32 if loading.device() == "cpu" else mx.bfloat16}


def test_the_content_id_is_that_of_the_content(tmp_path: Path) -> None:
    one = load(str(tiny_folder("llama"))).content_id
    folder = copy(tiny_folder("llama"), tmp_path)
    assert load(str(folder)).content_id == one, "wherever it lies"
    assert len({one, tiny("llama", seed=1).content_id, tiny("qwen3").content_id}) == 3
    stored = load_file(folder / "model.safetensors")
    stored["model.norm.weight"][0] += 1e-3
    before = identity(str(folder))
    save_file(stored, folder / "model.safetensors")
    assert load(str(folder)).content_id != one
    known = load(str(folder)).content_id
    (folder / "merges.txt").write_text("a b")
    assert load(str(folder)).content_id != known, "what the tokenizer is made of"
    assert identity(str(folder)) == load(str(folder)).identity != before
    assert identity("smollm2-135m-instruct") == "smollm2-135m-instruct" and identity("owner/name") == "owner/name"


def test_the_same_arguments_give_the_same_tiny_model(tmp_path: Path) -> None:
    write(tmp_path, "qwen2", seed=3)
    np.testing.assert_array_equal(logits(load(str(tmp_path))), logits(tiny("qwen2", seed=3)))


def test_the_tiny_tokenizer_keeps_every_byte() -> None:
    tokenizer = tiny("llama").tokenizer
    text = "a 1  é\n<|im_end|>日"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and max(ids) < 264 and tokenizer.eos_token_id in ids
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == (
        "<|im_start|>user\nx<|im_end|>\n"
    )


def edit(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config.update(changes)
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return change


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lose_a_tensor(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, folder / "model.safetensors")


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), r"has no config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json cannot be read"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), r"config\.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "names no model_type"),
        (edit(model_type=None), "names no model_type"),
        (edit(model_type="bert"), r"architecture bert is not one that mlx-lm [\d.]+ loads"),
        (edit(model_type="base"), "architecture base is not one"),
        (edit(model_type=7), "names no model_type"),
        (edit(model_file="run_me.py"), r"brings its own Python code \(run_me\.py\)"),
        (edit(hidden_size=None), "cannot be loaded"),
        (edit(hidden_size=96), "cannot be loaded .*; its weights and config.json do not fit"),
        (edit(num_hidden_layers=2), "cannot be loaded"),
        (remove("model.safetensors"), r"has no model\*\.safetensors"),
        (cut_weights, "cannot be loaded|cannot be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs"), "cannot be loaded"),
        (lose_a_tensor, r"cannot be loaded .*up_proj"),
        (remove("tokenizer.json"), "has no usable tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "has no usable tokenizer"),
    ],
)
def test_a_damaged_folder_is_one_clear_error(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = copy(tiny_folder("llama"), tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "free_memory_mb", lambda: 0.5)
    with pytest.raises(UserError, match=r"needs 1 MB here and 0 MB are free; take a smaller backbone"):
        load(str(tiny_folder("llama")))


@pytest.mark.parametrize(
    "id", ["", "gpt2", "smollm", "./nowhere", "/nowhere/model", "~/no-such-model", "a/b/c", "owner/", "/name", "../x/y"]
)
def test_a_wrong_id_names_the_right_ones(id: str) -> None:
    with pytest.raises(UserError, match=r"is unknown; give smollm2-135m-instruct, an existing model folder, or a hub"):
        load(id)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="is a file; give the folder"):
        fetch(str(tmp_path / "model.gguf"))


def test_context_length_is_looked_for_where_models_put_it() -> None:
    tokenizer = type("T", (), {"model_max_length": 10**30})()
    length = loading._context_length
    assert length({"max_position_embeddings": 8192}, tokenizer) == 8192
    assert length({"text_config": {"max_position_embeddings": 4096}}, tokenizer) == 4096
    assert length({"n_positions": 1024}, tokenizer) == 1024
    assert length({}, tokenizer) == loading.CONTEXT_UNKNOWN
    assert length({}, type("T", (), {"model_max_length": 512})()) == 512


FETCH = """
import sys
from metapeft.backbones import load
from metapeft.errors import MetapeftError
try:
    print("loaded", load(sys.argv[1]).context_length)
except MetapeftError as error:
    print(error.exit_code, error)
"""


def from_hub(id: str, cache: Path, **variables: str) -> str:
    """In a process of its own: the hub's client reads its address when it is imported."""
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **variables}
    done = subprocess.run(
        [sys.executable, "-c", FETCH, id], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_from_a_hub(tmp_path: Path) -> None:
    """Found, cut in the middle, found again, then without network; missing and gated ones."""
    models, cache = tmp_path / "models", tmp_path / "cache"
    shutil.copytree(tiny_folder("llama"), models / "owner" / "tiny")
    with hub(models, broken={"model.safetensors"}) as address:
        assert "1 cannot download backbone owner/tiny" in from_hub("owner/tiny", cache, HF_ENDPOINT=address)
    assert "1 cannot download backbone owner/tiny" in from_hub("owner/tiny", cache, HF_HUB_OFFLINE="1"), "no half model"
    with hub(models) as address:
        assert from_hub("owner/tiny", cache, HF_ENDPOINT=address) == f"loaded {CONTEXT}"
        assert "2 backbone owner/none does not exist on the hub" in from_hub("owner/none", cache, HF_ENDPOINT=address)
    assert from_hub("owner/tiny", cache, HF_HUB_OFFLINE="1") == f"loaded {CONTEXT}"
    with hub(models, gated={"owner/tiny"}) as address:
        assert "2 backbone owner/tiny is gated: accept its licence" in from_hub(
            "owner/tiny", tmp_path / "empty", HF_ENDPOINT=address
        )


def test_no_network(tmp_path: Path) -> None:
    said = from_hub("owner/tiny", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert said.startswith("1 cannot download backbone owner/tiny (") and "smollm2-135m-instruct needs no hub" in said


def test_layers_that_do_not_attend_are_refused() -> None:
    with pytest.raises(UserError, match="architecture granitemoehybrid has layers without attention"):
        tiny("granitemoehybrid")


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    folder = copy(tiny_folder("llama"), tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text())
    del config["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load(str(folder))


@pytest.mark.parametrize(("name", "value"), [("rope_scaling", "yarn"), ("num_attention_heads", 0)])
def test_a_configuration_that_fits_no_model(tmp_path: Path, name: str, value: object) -> None:
    folder = copy(tiny_folder("llama"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(UserError, match="cannot be loaded"):
        load(str(folder))
