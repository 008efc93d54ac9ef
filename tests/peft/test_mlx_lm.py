"""mlx-lm's adapters: those its own tuner makes are read, those we write give the same text in mlx_lm."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx_lm
import numpy as np
import pytest
from hypothesis import given, settings
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from metapeft.errors import UserError
from metapeft.peft import adapters, checkpoints
from metapeft.peft import mlx_lm as format_
from metapeft.peft.saved import Saved
from metapeft.runtime import mx, nn, optim
from tests.backbones.tiny import tiny_folder
from tests.peft import reference
from tests.peft.test_huggingface import MODEL, OURS, folder_of, fresh, pruned, saved_loras

MATRICES = [name for name, (method, _) in OURS.items() if method in ("lora", "adalora")]
LORAS = [name for name in reference.FOLDERS if "lora" in name]
PROMPT = "The quick brown fox"


def base() -> tuple[nn.Module, Any]:
    return mlx_lm.load(str(tiny_folder("llama")))


def text(model: nn.Module, tokenizer: Any) -> str:
    return mlx_lm.generate(model, tokenizer, prompt=PROMPT, max_tokens=24)


def logits(model: nn.Module) -> np.ndarray:
    return np.array(model(mx.array([[5, 9, 200, 31, 77, 4]])))


def trained_by_mlx_lm(folder: Path, num_layers: int, keys: list[str] | None) -> nn.Module:
    """Three optimizer steps of mlx-lm's own LoRA layers on a tiny model, saved the way its trainer saves."""
    model, _ = base()
    model.freeze()
    parameters: dict[str, Any] = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    if keys is not None:
        parameters["keys"] = keys
    mx.random.seed(1)
    linear_to_lora_layers(model, num_layers, parameters)
    ids = mx.random.randint(0, 256, (2, 12))

    def loss(model: nn.Module) -> mx.array:
        return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="mean")

    optimizer = optim.Adam(learning_rate=0.02)
    for _ in range(3):
        _, gradients = nn.value_and_grad(model, loss)(model)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
    folder.mkdir()
    weights = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": num_layers, "lora_parameters": parameters, "model": "tiny"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize(
    ("num_layers", "keys"),
    [(2, None), (-1, ["self_attn.q_proj", "mlp.down_proj"]), (4, ["self_attn.v_proj"])],
)
def test_an_adapter_trained_by_mlx_lm(num_layers: int, keys: list[str] | None, tmp_path: Path) -> None:
    trained = trained_by_mlx_lm(tmp_path / "theirs", num_layers, keys)
    untouched, tokenizer = base()
    plain, before = logits(untouched), text(untouched, tokenizer)
    checkpoints.convert(tmp_path / "theirs", tmp_path / "ours", "metapeft")
    checkpoints.convert(tmp_path / "ours", tmp_path / "back", "mlx-lm")
    for name in ("theirs", "ours"):
        model, _ = base()
        loaded = adapters.with_adapter(model, adapters.load(tmp_path / name, model))
        np.testing.assert_allclose(logits(loaded), logits(trained), rtol=0, atol=1e-4)
        assert text(loaded, tokenizer) == text(trained, tokenizer)
    again, _ = mlx_lm.load(str(tiny_folder("llama")), adapter_path=str(tmp_path / "back"))
    assert text(again, tokenizer) == text(trained, tokenizer)
    np.testing.assert_array_equal(logits(again), logits(trained))
    assert np.abs(plain - logits(trained)).max() > 0.1
    assert before != text(trained, tokenizer)


@pytest.mark.parametrize("name", [*MATRICES, "pruned"])
def test_an_adapter_of_ours_in_mlx_lm(name: str, tmp_path: Path) -> None:
    model, tokenizer = base()
    adapter = pruned(model) if name == "pruned" else fresh(*OURS[name], model)
    adapters.save(adapter, tmp_path / "ours", {"backbone": "tiny", "layers": 4})
    checkpoints.convert(tmp_path / "ours", tmp_path / "theirs", "mlx-lm")
    ours = adapters.with_adapter(model, adapter)
    theirs, _ = mlx_lm.load(str(tiny_folder("llama")), adapter_path=str(tmp_path / "theirs"))
    np.testing.assert_allclose(logits(theirs), logits(ours), rtol=0, atol=1e-4)
    assert text(theirs, tokenizer) == text(ours, tokenizer)
    assert np.abs(logits(ours) - logits(base()[0])).max() > 0.1


@pytest.mark.parametrize("name", LORAS)
def test_from_the_original_to_mlx_lm(name: str, tmp_path: Path) -> None:
    """Hugging Face PEFT's folders, by way of mlx-lm's format, with the original's logits at the end."""
    checkpoints.convert(folder_of(name), tmp_path / "mlx", "mlx-lm")
    model = load_adapters(reference.model(), str(tmp_path / "mlx"))
    reference.assert_same_logits(model(reference.tokens()), name)


def test_only_the_layers_that_are_adapted_are_wrapped_when_the_depth_is_known(tmp_path: Path) -> None:
    saved = checkpoints.read(folder_of("lora_top_layer"))
    for metadata, expected in (({"layers": 3}, 1), ({}, -1)):
        files = format_.encode(Saved(saved.config, saved.tensors, metadata))
        assert json.loads(files["adapter_config.json"])["num_layers"] == expected


def test_the_command_line_of_mlx_lm_gives_the_same_text(tmp_path: Path) -> None:
    model, tokenizer = base()
    adapter = fresh(*OURS["patterns"], model)
    adapters.save(adapter, tmp_path / "ours", {})
    checkpoints.convert(tmp_path / "ours", tmp_path / "mlx", "mlx-lm")
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(tiny_folder("llama")), "--verbose", "false"]
    command += ["--adapter-path", str(tmp_path / "mlx"), "--ignore-chat-template", "--prompt", PROMPT]
    ran = subprocess.run([*command, "--max-tokens", "24", "--temp", "0"], capture_output=True, timeout=200)
    assert ran.returncode == 0, ran.stderr.decode()[-2000:]
    expected = text(adapters.with_adapter(model, adapter), tokenizer)
    assert expected.strip() in ran.stdout.decode(errors="replace")


@given(saved=saved_loras())
@settings(max_examples=60, deadline=None)
def test_any_mixture_of_ranks_and_scales_is_kept(saved: Saved) -> None:
    """Every module's change, scale * B A, is the same after padding to one rank and folding into one scale."""
    before = adapters.lora.from_tensors(saved.config, saved.tensors).deltas
    back = format_.decode(format_.encode(saved), Path("x"))
    after = adapters.lora.from_tensors(back.config, back.tensors).deltas
    assert before.keys() == after.keys()
    for path, delta in before.items():
        np.testing.assert_allclose(np.array(after[path].weight()), np.array(delta.weight()), rtol=1e-6)
    assert set(adapters.linear_layers(MODEL, back.config.targets)) >= set(before)


@pytest.mark.parametrize("name", ["prompt", "prefix", "p_tuning"])
def test_methods_that_mlx_lm_does_not_have_are_refused(name: str, tmp_path: Path) -> None:
    model = reference.model()
    adapters.save(fresh(*OURS[name], model), tmp_path / "ours", {})
    with pytest.raises(UserError, match="mlx-lm has no"):
        checkpoints.convert(tmp_path / "ours", tmp_path / "mlx", "mlx-lm")
    assert not (tmp_path / "mlx").exists()


WEIGHT = "model.layers.0.self_attn.q_proj"
PAIR = {f"{WEIGHT}.lora_a": mx.ones((8, 2)), f"{WEIGHT}.lora_b": mx.ones((2, 8))}
CONFIG = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0}}


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        ({"fine_tune_type": "dora"}, PAIR, "fine_tune_type 'dora' is not supported"),
        ({"fine_tune_type": "full"}, PAIR, "fine_tune_type 'full' is not supported"),
        ({"lora_parameters": None}, PAIR, "needs lora_parameters with a rank and a scale"),
        ({"lora_parameters": {"rank": 2, "alpha": 16}}, PAIR, "needs lora_parameters with a rank and a scale"),
        ({"lora_parameters": {"rank": 3, "scale": 1.0}}, PAIR, "says rank 3"),
        ({"lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 7}}, PAIR, "dropout 7 is not in"),
        ({}, {f"{WEIGHT}.lora_a": mx.ones((8, 2))}, "has no lora_b"),
        ({}, PAIR | {f"{WEIGHT}.m": mx.ones(8)}, "no LoRA matrix"),
        ({}, {}, "holds no tensors"),
        (
            {},
            {"model.embed_tokens.lora_a": mx.ones((8, 2)), "model.embed_tokens.lora_b": mx.ones((2, 8))},
            "not a linear layer",
        ),
        ({}, {f"{WEIGHT}.lora_a": mx.ones((4, 2, 8)), f"{WEIGHT}.lora_b": mx.ones((4, 8, 2))}, "not a linear layer"),
    ],
)
def test_refuses_what_is_no_lora(
    config: dict[str, Any], tensors: dict[str, mx.array], words: str, tmp_path: Path
) -> None:
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    with pytest.raises(UserError, match=words) as caught:
        checkpoints.read(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), PAIR)
    with pytest.raises(UserError, match=r"adapter_config\.json is missing"):
        checkpoints.read(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG)[:-3])
    with pytest.raises(UserError, match=r"adapter_config\.json is not valid JSON"):
        checkpoints.read(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    content = (tmp_path / "adapters.safetensors").read_bytes()
    (tmp_path / "adapters.safetensors").write_bytes(content[:-5])
    with pytest.raises(UserError, match=r"adapters\.safetensors is not a whole safetensors file"):
        checkpoints.read(tmp_path)
