"""Hugging Face PEFT: folders it wrote are read, folders we write hold the same, and the original loads them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from metapeft.errors import UserError
from metapeft.peft import adalora, adapters, checkpoints, create, huggingface, lora, parse
from metapeft.peft.base import Adapter
from metapeft.peft.matrices import linear_layers
from metapeft.peft.saved import Saved
from metapeft.runtime import mx, nn
from tests.backbones import tiny
from tests.peft import reference

ORIGINAL = os.environ.get("METAPEFT_REFERENCE_PYTHON", "")
MODEL = reference.model()
LINEAR = sorted(linear_layers(MODEL))
EVERY_MODULE = [*LINEAR, "lm_head"]


def folder_of(name: str) -> Path:
    return reference.DATA / name / "adapter"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / huggingface.CONFIG).read_text())


# What a PEFT configuration means, by PEFT's own rules (peft/tuners/tuners_utils.py and utils/other.py)


def targeted(config: dict[str, Any], path: str) -> bool:
    """Whether PEFT would adapt the module."""
    excluded, targets = config.get("exclude_modules"), config["target_modules"]
    if isinstance(excluded, str) and re.fullmatch(excluded, path):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    if path in targets:
        return True
    if not any(path.endswith(f".{target}") for target in targets):
        return False
    layers = config.get("layers_to_transform")
    index = re.match(r".*?\.[^.]*\.(\d+)\.", path)
    return not layers or (index is not None and int(index[1]) in layers)


def meaning(config: dict[str, Any]) -> dict[str, Any]:
    """Everything in a configuration that changes what the trained adapter computes, or how it would train on."""
    kind = config["peft_type"]
    plain = {
        "LORA": ["lora_dropout", "use_rslora", "bias"],
        "ADALORA": [
            *("init_r", "target_r", "lora_alpha", "lora_dropout", "tinit", "tfinal", "deltaT", "total_step"),
            *("beta1", "beta2", "orth_reg_weight", "rank_pattern", "bias"),
        ],
        "PROMPT_TUNING": ["num_virtual_tokens", "token_dim", "num_layers", "prompt_tuning_init"],
        "PREFIX_TUNING": [
            *("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "prefix_projection"),
        ],
        "P_TUNING": ["num_virtual_tokens", "token_dim", "encoder_reparameterization_type", "encoder_hidden_size"],
    }[kind]
    found = {key: config[key] for key in ("peft_type", "task_type", "inference_mode", *plain)}
    if kind in ("LORA", "ADALORA"):
        found["modules"] = [path for path in EVERY_MODULE if targeted(config, path)]
    if kind == "LORA":
        for name, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            patterns = config[name]
            found[name] = {
                path: next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", path)), config[default])
                for path in found["modules"]
            }
    return found


@pytest.mark.parametrize("name", reference.FOLDERS)
def test_a_folder_of_the_original_gives_its_logits(name: str) -> None:
    model = reference.model()
    adapter = adapters.load(folder_of(name), model)
    reference.assert_same_logits(adapters.with_adapter(model, adapter)(reference.tokens()), name)


@pytest.mark.parametrize("name", reference.FOLDERS)
def test_through_a_model_and_out_again_nothing_changes(name: str, tmp_path: Path) -> None:
    source = folder_of(name)
    saved = checkpoints.read(source)
    adapter = adapters.build(saved, reference.model())
    checkpoints.to_peft(tmp_path / "out", adapters.take(adapter, saved.metadata))
    written, original = (load_file(folder / huggingface.WEIGHTS) for folder in (tmp_path / "out", source))
    assert written.keys() == original.keys()
    for key, value in original.items():
        assert written[key].dtype == value.dtype
        np.testing.assert_array_equal(written[key], value, err_msg=key)
    assert meaning(config_of(tmp_path / "out")) == meaning(config_of(source))


@pytest.mark.parametrize("name", reference.FOLDERS)
def test_without_a_model_the_weights_are_the_same_file(name: str, tmp_path: Path) -> None:
    checkpoints.convert(folder_of(name), tmp_path / "ours", "metapeft", backbone="base")
    checkpoints.convert(tmp_path / "ours", tmp_path / "out", "peft")
    assert (tmp_path / "out" / huggingface.WEIGHTS).read_bytes() == (folder_of(name) / huggingface.WEIGHTS).read_bytes()
    assert meaning(config_of(tmp_path / "out")) == meaning(config_of(folder_of(name)))
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == "base"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {huggingface.CONFIG, huggingface.WEIGHTS}


# Adapters of our own, for every way that modules, ranks and scales can be chosen


def fresh(method: str, values: dict[str, Any], model: nn.Module) -> Adapter:
    """An adapter with every parameter away from its start, so that no part of it can be lost unseen."""
    adapter = create(parse(method, values), model, seed=3, text_ids=[5, 6, 7], vocabulary=128)
    keys = iter(mx.random.split(mx.random.key(4), 500))
    tree = adapter.module.parameters()
    from mlx.utils import tree_map

    adapter.module.update(tree_map(lambda p: p + 0.15 * mx.random.normal(p.shape, key=next(keys)), tree))
    return adapter


def pruned(model: nn.Module) -> adalora.AdaLoRA:
    """An AdaLoRA after pruning, with one module that has lost every rank."""
    adapter = fresh("adalora", {"initial_rank": 5, "target_rank": 2, "targets": ["q_proj", "down_proj"]}, model)
    assert isinstance(adapter, adalora.AdaLoRA)
    rng = np.random.default_rng(0)
    adapter.kept = {path: mx.array(rng.random((5, 1)) < 0.6) for path in adapter.deltas}
    adapter.kept["model.layers.1.mlp.down_proj"] = mx.zeros((5, 1), dtype=mx.bool_)
    adapter._mask()
    return adapter


OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "all_linear": ("lora", {"rank": 3, "alpha": 7.5}),
    "top_layer": ("lora", {"rank": 3, "layers": 1, "targets": ["q_proj", "up_proj"]}),
    "endings": ("lora", {"rank": 3, "targets": ["self_attn.q_proj", "mlp.up_proj"], "rslora": True}),
    "single_modules": ("lora", {"rank": 3, "targets": ["layers.0.mlp.up_proj", "model.layers.2.self_attn.k_proj"]}),
    "patterns": (
        "lora",
        {
            "rank": 3,
            "targets": ["q_proj", "v_proj"],
            "rank_pattern": {"q_proj": 5, "layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"v_proj": 3.25, "2.self_attn.v_proj": 30.0},
        },
    ),
    "adalora": ("adalora", {"initial_rank": 4, "layers": 2}),
    "prompt": ("prompt", {"tokens": 6}),
    "prefix": ("prefix", {"tokens": 3}),
    "prefix_projection": ("prefix", {"tokens": 3, "projection": 12}),
    "p_tuning": ("p_tuning", {"tokens": 4, "width": 20}),
    "p_tuning_lstm": ("p_tuning", {"tokens": 4, "width": 8, "encoder": "lstm"}),
}


@pytest.mark.parametrize("name", [*OURS, "pruned"])
def test_an_adapter_of_ours_comes_back_the_same(name: str, tmp_path: Path) -> None:
    model = reference.model()
    adapter = pruned(model) if name == "pruned" else fresh(*OURS[name], model)
    adapters.save(adapter, tmp_path / "ours", {"backbone": "base"})
    expected = adapters.with_adapter(model, adapter)(reference.tokens())
    for form in ("ours", "theirs"):
        if form == "theirs":
            checkpoints.convert(tmp_path / "ours", tmp_path / "theirs", "peft")
        loaded_on = reference.model()
        loaded = adapters.load(tmp_path / form, loaded_on)
        if form == "ours":
            assert loaded.config == adapter.config
        got = adapters.with_adapter(loaded_on, loaded)(reference.tokens())
        np.testing.assert_allclose(np.array(got), np.array(expected), rtol=0, atol=1e-5)
        again = adapters.take(loaded, {"backbone": "base"})
        assert huggingface.encode(again)[huggingface.WEIGHTS] == (tmp_path / "ours" / huggingface.WEIGHTS).read_bytes()
    if isinstance(adapter, lora.MatrixAdapter):
        config = config_of(tmp_path / "theirs")
        assert [path for path in EVERY_MODULE if targeted(config, path)] == sorted(adapter.deltas)


def test_a_mask_newer_than_the_weights_does_not_prune_them(tmp_path: Path) -> None:
    """Training ends with its best weights, which may be from before the last pruning: what was scored is saved."""
    model = reference.model()
    adapter = pruned(model)
    for path, delta in adapter.deltas.items():
        delta.e = mx.where(adapter.kept[path], delta.e, 0.7)
    adapters.save(adapter, tmp_path / "a", {})
    expected = adapters.with_adapter(model, adapter)(reference.tokens())
    loaded_on = reference.model()
    got = adapters.with_adapter(loaded_on, adapters.load(tmp_path / "a", loaded_on))(reference.tokens())
    np.testing.assert_allclose(np.array(got), np.array(expected), rtol=0, atol=1e-5)


needs_the_original = pytest.mark.skipif(
    not ORIGINAL, reason="METAPEFT_REFERENCE_PYTHON does not name an interpreter with Hugging Face PEFT"
)


def logits_of_the_original(base: Path, batch: dict[str, Any], folders: list[Path], room: Path) -> dict[str, np.ndarray]:
    """Folder name -> what Hugging Face PEFT computes with that adapter."""
    (room / "tokens.json").write_text(json.dumps(batch))
    command = [ORIGINAL, str(reference.DATA.parent / "check_export.py"), str(base), str(room / "tokens.json")]
    command += [str(room / "logits.safetensors"), *map(str, folders)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return load_file(room / "logits.safetensors")


@needs_the_original
def test_the_original_loads_our_folders_and_computes_the_same(tmp_path: Path) -> None:
    batch = reference.facts("batches.json")[0]
    expected = {}
    for name in [*OURS, "pruned", *(f"reference_{name}" for name in reference.FOLDERS)]:
        model = reference.model()
        if name.startswith("reference_"):
            adapter = adapters.load(folder_of(name.removeprefix("reference_")), model)
        else:
            adapter = pruned(model) if name == "pruned" else fresh(*OURS[name], model)
        adapters.save(adapter, tmp_path / name, {})
        expected[name] = np.array(adapters.with_adapter(model, adapter)(reference.tokens()))
    found = logits_of_the_original(reference.BASE, batch, [tmp_path / name for name in expected], tmp_path)
    assert found.keys() == expected.keys()
    real = np.arange(14)[None] < np.array(batch["lengths"])[:, None]
    for name, logits in expected.items():
        np.testing.assert_allclose(found[name][real], logits[real], rtol=0, atol=1e-4, err_msg=name)


def in_the_originals_layout(base: Path, folder: Path) -> Path:
    """The model folder as Hugging Face has it: mlx-lm stacks the experts of a layer in one tensor."""
    shutil.copytree(base, folder)
    weights = mx.load(str(base / "model.safetensors"))
    for name in [name for name in weights if ".switch_mlp." in name]:
        for index, expert in enumerate(weights.pop(name)):
            weights[name.replace(".switch_mlp.", f".experts.{index}.")] = expert
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    return folder


@pytest.mark.slow
@needs_the_original
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_original_agrees_on_every_architecture(architecture: str, tmp_path: Path) -> None:
    base = in_the_originals_layout(tiny.tiny_folder(architecture), tmp_path / "base")
    some = ("all_linear", "adalora", "prompt", "prefix", "p_tuning")
    the_original_agrees(architecture, base, {name: OURS[name] for name in some}, tmp_path)


def the_original_agrees(architecture: str, base: Path, made: dict[str, tuple[str, dict[str, Any]]], room: Path) -> None:
    """Hugging Face PEFT computes with each adapter what metapeft does; `base` is the model in its layout."""
    batch = {"tokens": np.random.default_rng(0).integers(0, 256, (3, 24)).tolist(), "lengths": [24, 18, 9]}
    expected = {}
    for name, (method, values) in made.items():
        model = tiny.tiny(architecture).model
        adapter = fresh(method, values, model)
        adapters.save(adapter, room / name, {})
        expected[name] = np.array(adapters.with_adapter(model, adapter)(mx.array(batch["tokens"])))
    found = logits_of_the_original(base, batch, [room / name for name in expected], room)
    real = np.arange(24)[None] < np.array(batch["lengths"])[:, None]
    for name, logits in expected.items():
        tolerance = 1e-4 * max(1.0, float(np.abs(logits).max()))
        np.testing.assert_allclose(found[name][real], logits[real], rtol=0, atol=tolerance, err_msg=name)


@st.composite
def saved_loras(draw: st.DrawFn) -> Saved:
    """LoRAs over any set of modules, with any rank and alpha per module."""
    paths = draw(st.lists(st.sampled_from(LINEAR), min_size=1, unique=True))
    ranks = {path: draw(st.integers(1, 4)) for path in paths}
    config = lora.LoRAConfig(
        rank=draw(st.integers(1, 4)),
        alpha=draw(st.sampled_from([1.0, 8.0, 2.5])),
        rslora=draw(st.booleans()),
        targets=tuple(paths),
        rank_pattern=ranks,
        alpha_pattern={path: draw(st.sampled_from([1.0, 3.0, 8.5])) for path in paths if draw(st.booleans())},
    )
    tensors = {}
    for path in paths:
        tensors[f"base_model.model.{path}.lora_A.weight"] = mx.ones((ranks[path], 3))
        tensors[f"base_model.model.{path}.lora_B.weight"] = mx.ones((2, ranks[path]))
    return Saved(config, tensors)


@given(saved=saved_loras())
@settings(max_examples=150, deadline=None)
def test_any_lora_keeps_its_modules_ranks_and_scales(saved: Saved) -> None:
    files = huggingface.encode(saved)
    back = huggingface.decode(files, Path("x"))
    before, after = (lora.from_tensors(s.config, s.tensors).deltas for s in (saved, back))
    assert before.keys() == after.keys()
    for path, delta in before.items():
        assert after[path].scale == delta.scale
        assert after[path].a.shape == delta.a.shape
    config = json.loads(files[huggingface.CONFIG])
    assert {path for path in EVERY_MODULE if targeted(config, path)} == set(before)
    assert set(linear_layers(MODEL, back.config.targets, back.config.layers)) == set(before)
    assert huggingface.encode(back)[huggingface.WEIGHTS] == files[huggingface.WEIGHTS]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_half_precision_is_read_and_written_as_it_is(dtype: mx.Dtype, tmp_path: Path) -> None:
    saved = checkpoints.read(folder_of("lora"))
    cast = replace(saved, tensors={name: value.astype(dtype) for name, value in saved.tensors.items()})
    checkpoints.to_peft(tmp_path / "out", cast)
    back = checkpoints.read(tmp_path / "out")
    for name, value in cast.tensors.items():
        assert back.tensors[name].dtype == dtype
        assert mx.array_equal(back.tensors[name], value)
    model = reference.model()
    logits = adapters.with_adapter(model, adapters.load(tmp_path / "out", model))(reference.tokens())
    reference.assert_same_logits(logits, "lora", tolerance=0.1)


def test_other_names_on_the_way_to_the_layers_are_understood(tmp_path: Path) -> None:
    """The original calls the text layers of a multimodal model model.language_model.layers…, mlx-lm may not."""
    saved = checkpoints.read(folder_of("lora"))
    renamed = {name.replace("model.layers.", "model.language_model.layers."): v for name, v in saved.tensors.items()}
    model = reference.model()
    adapter = adapters.build(replace(saved, tensors=renamed), model)
    reference.assert_same_logits(adapters.with_adapter(model, adapter)(reference.tokens()), "lora")


GPT2 = {"rank": 3, "targets": ["c_attn", "model.h.1.mlp.c_fc"], "alpha_pattern": {"model.h.2.attn.c_attn": 9.0}}


@pytest.mark.parametrize(("method", "values"), [("lora", GPT2), ("adalora", {"targets": ["model.h.1.mlp.c_fc"]})])
def test_modules_are_called_what_the_original_calls_them(method: str, values: dict[str, Any], tmp_path: Path) -> None:
    """GPT-2's layers are transformer.h in Hugging Face's model and model.h in mlx-lm's; scales by module stay."""
    model = tiny.tiny("gpt2").model
    adapter = fresh(method, values, model)
    adapters.save(adapter, tmp_path / "ours", {})
    tokens = mx.array([[5, 6, 7, 8]])
    expected = adapters.with_adapter(model, adapter)(tokens)
    written = load_file(tmp_path / "ours" / huggingface.WEIGHTS)
    assert all(name.startswith("base_model.model.transformer.h.") for name in written)
    assert "model.h." not in (tmp_path / "ours" / huggingface.CONFIG).read_text()
    assert checkpoints.read(tmp_path / "ours").config == adapter.config
    checkpoints.convert(tmp_path / "ours", tmp_path / "theirs", "peft")
    for name in ("ours", "theirs"):
        again = tiny.tiny("gpt2").model
        got = adapters.with_adapter(again, adapters.load(tmp_path / name, again))(tokens)
        np.testing.assert_allclose(np.array(got), np.array(expected), rtol=0, atol=1e-5, err_msg=name)
    if method == "lora":
        checkpoints.convert(tmp_path / "ours", tmp_path / "mlx", "mlx-lm")
        assert all(name.startswith("model.h.") for name in load_file(tmp_path / "mlx" / "adapters.safetensors"))


@needs_the_original
def test_the_original_agrees_on_gpt2(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny.tiny_folder("gpt2"), base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))  # mlx-lm's always are
    weights = {}
    for name, value in mx.load(str(base / "model.safetensors")).items():
        linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        weights[name.replace("model.", "transformer.")] = mx.contiguous(value.T) if linear else value
    mx.save_safetensors(str(base / "model.safetensors"), weights, {"format": "pt"})
    made = {"named": ("lora", GPT2), "all": OURS["all_linear"], "ada": OURS["adalora"]}
    the_original_agrees("gpt2", base, made, tmp_path)


# What is refused, and how


def changed(tmp_path: Path, name: str, **values: Any) -> Path:
    folder = tmp_path / "changed"
    shutil.copytree(folder_of(name), folder, dirs_exist_ok=True)
    config = config_of(folder) | values
    (folder / huggingface.CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("lora", {"use_dora": True}, "use_dora=True is not supported"),
        ("lora", {"use_something_new": {"a": 1}}, "use_something_new"),
        ("lora", {"bias": "all"}, "bias='all' is not supported"),
        ("lora", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("lora", {"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ("lora", {"init_lora_weights": "pissa_niter_4"}, "changes the base model"),
        ("lora", {"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ("lora", {"peft_type": ...}, "peft_type None is not supported"),
        ("lora", {"task_type": "SEQ_CLS"}, "task_type SEQ_CLS is not supported"),
        ("lora", {"r": ...}, "has no 'r'"),
        ("lora", {"r": "many"}, "holds a wrong value"),
        ("lora", {"r": 5}, "has rank 4 and adapter_config.json says 5"),
        ("lora", {"rank_pattern": {"q_proj": 2}}, "q_proj has rank 4 and adapter_config.json says 2"),
        ("lora", {"rank_pattern": {"(": 2}}, "holds a wrong value"),
        ("lora", {"lora_dropout": 1.0}, r"dropout 1 is not in \[0, 1\)"),
        ("adalora", {"lora_dropout": -1e20}, r"dropout -1e\+20 is not in \[0, 1\)"),
        ("adalora", {"total_step": ...}, "has no 'total_step'"),
        ("adalora_run", {"rank_pattern": None}, "adapter_config.json says 6"),
        ("adalora", {"peft_type": "LORA", "r": 6}, "is not a lora matrix"),
        ("prompt", {"num_virtual_tokens": 6}, r"shape \[5, 32\] and adapter_config.json says \[6, 32\]"),
        ("prompt", {"num_transformer_submodules": 2}, "encoder-decoder"),
        ("prefix", {"num_layers": 4}, r"says \[4, 128\]"),
        ("prefix", {"num_layers": ...}, "num_layers"),
        ("prefix", {"num_layers": "0"}, "num_layers"),
        ("prefix", {"peft_type": "LORA", "r": 4, "lora_alpha": 8}, "is not a lora matrix"),
    ],
)
def test_refuses_what_it_cannot_compute(name: str, values: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = changed(tmp_path, name, **values)
    with pytest.raises(UserError, match=words) as caught:
        checkpoints.read(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("lora", lambda t: t.pop(sorted(t)[1]), "has no lora_B; the file is incomplete"),
        ("lora", lambda t: t.update({"base_model.model.lm_head.bias": np.zeros(3, np.float32)}), "lm_head.bias"),
        ("lora", lambda t: t.clear(), "holds no tensors"),
        ("lora", lambda t: t.update({sorted(t)[1]: np.zeros((32, 3), np.float32)}), "do not fit together"),
        ("lora", lambda t: t.update({sorted(t)[0]: np.zeros(4, np.float32)}), "it must be a matrix"),
        ("lora", lambda t: t.update({sorted(t)[0]: np.zeros((4, 64), np.int8)}), "as I8"),
        ("adalora", lambda t: t.pop(sorted(t)[2]), "has no lora_E"),
        ("prompt", lambda t: t.update(more=np.zeros(1, np.float32)), "must hold one tensor"),
        ("prompt", lambda t: t.update(prompt_embeddings=np.zeros((5, 8), np.float32)), r"shape \[5, 8\]"),
    ],
)
def test_refuses_tensors_that_do_not_fit(name: str, change: Any, words: str, tmp_path: Path) -> None:
    folder = changed(tmp_path, name)
    tensors = load_file(folder / huggingface.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / huggingface.WEIGHTS)
    with pytest.raises(UserError, match=words) as caught:
        checkpoints.read(folder)
    assert str(folder / huggingface.WEIGHTS) in str(caught.value)


@given(cut=st.integers(0, 29_000))
@settings(max_examples=40, deadline=None)
def test_a_truncated_file_is_refused_wherever_it_was_cut(cut: int) -> None:
    files = {name: (folder_of("lora") / name).read_bytes() for name in (huggingface.CONFIG, huggingface.WEIGHTS)}
    files[huggingface.WEIGHTS] = files[huggingface.WEIGHTS][:cut]
    with pytest.raises(UserError, match="not a whole safetensors file"):
        huggingface.decode(files, Path("x"))


@given(content=st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_random_bytes_are_refused_with_a_sentence(content: bytes) -> None:
    config = (folder_of("lora") / huggingface.CONFIG).read_bytes()
    for files in (
        {huggingface.CONFIG: config, huggingface.WEIGHTS: content},
        {huggingface.CONFIG: content, huggingface.WEIGHTS: b""},
    ):
        with pytest.raises(UserError):
            huggingface.decode(files, Path("x"))


@pytest.mark.parametrize("name", ["lora", "adalora", "prompt", "prefix", "p_tuning_mlp"])
def test_another_backbone_is_refused(name: str) -> None:
    model = tiny.tiny("llama").model
    with pytest.raises(UserError, match="made for another backbone"):
        adapters.load(folder_of(name), model)


def test_a_module_outside_the_layers_is_refused() -> None:
    saved = checkpoints.read(folder_of("lora"))
    extra = {"base_model.model.lm_head.lora_A.weight": mx.zeros((4, 32))}
    extra |= {"base_model.model.lm_head.lora_B.weight": mx.zeros((128, 4))}
    with pytest.raises(UserError, match="adapts lm_head, which is no linear layer"):
        adapters.build(replace(saved, tensors=saved.tensors | extra), reference.model())
