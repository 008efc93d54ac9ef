"""Write the reference values that metapeft's methods are tested against (see README.md for the environment).

    python tests/reference/generate.py [FOLDER]

Everything is float32 on one CPU thread and seeded, so that running it again gives the same values to rounding.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

VOCABULARY, WIDTH, LAYERS = 128, 32, 3
BATCHES, ROWS, LONGEST = 3, 4, 14
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Each case: its configuration, and the spread of the noise its trained parameters start from (None: PEFT's own start).
CASES: dict[str, tuple[Callable[[], PeftConfig], float | None]] = {
    "lora": (lambda: LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, task_type="CAUSAL_LM"), 0.2),
    "lora_rslora": (
        lambda: LoraConfig(r=4, lora_alpha=8, target_modules=LINEAR, use_rslora=True, task_type="CAUSAL_LM"),
        0.2,
    ),
    "lora_patterns": (
        lambda: LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "v_proj"],
            rank_pattern={"q_proj": 6, r"layers\.2\.self_attn\.v_proj": 2},
            alpha_pattern={r"model\.layers\.[01]\.self_attn\.q_proj": 24, "v_proj": 5},
            task_type="CAUSAL_LM",
        ),
        0.2,
    ),
    "lora_top_layer": (
        lambda: LoraConfig(
            r=2,
            lora_alpha=3,
            target_modules=r".*\.(o_proj|down_proj)",
            exclude_modules=r".*layers\.[01]\..*",
            use_rslora=True,
            task_type="CAUSAL_LM",
        ),
        0.2,
    ),
    "adalora": (
        lambda: AdaLoraConfig(
            init_r=6,
            target_r=3,
            lora_alpha=12,
            target_modules=LINEAR,
            total_step=30,
            tinit=5,
            tfinal=10,
            orth_reg_weight=0.5,
            task_type="CAUSAL_LM",
        ),
        0.3,
    ),
    "prompt": (lambda: PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"), None),
    "prefix": (lambda: PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), None),
    "prefix_projection": (
        lambda: PrefixTuningConfig(
            num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=24, task_type="CAUSAL_LM"
        ),
        0.4,
    ),
    "p_tuning_mlp": (
        lambda: PromptEncoderConfig(
            num_virtual_tokens=5, encoder_reparameterization_type="MLP", encoder_hidden_size=24, task_type="CAUSAL_LM"
        ),
        0.3,
    ),
    "p_tuning_lstm": (
        lambda: PromptEncoderConfig(
            num_virtual_tokens=5,
            encoder_reparameterization_type="LSTM",
            encoder_hidden_size=12,
            encoder_num_layers=2,
            task_type="CAUSAL_LM",
        ),
        0.3,
    ),
}

RUN = {"steps": 30, "optimizer": "sgd", "learning_rate": 0.05, "momentum": 0.0, "weight_decay": 0.0, "seed": 33}


def main() -> None:
    if os.environ.get("PYTHONHASHSEED") != "0":  # PEFT writes sets of module names in hash order
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONHASHSEED": "0"})
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data"
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    batches = make_batches()
    write_json(folder / "batches.json", batches)
    base = make_base()
    write_base(base, batches[0], folder / "base")
    for name, (configure, noise) in CASES.items():
        write_case(configure(), noise, batches[0], folder / "base", folder / name)
    write_adalora_run(batches, folder / "base", folder / "adalora_run")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.2f} MB")


# The base model and the data


def make_base() -> LlamaForCausalLM:
    """Three Llama layers with grouped-query attention. Weights are large enough that attention is far from uniform."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=False,
            attention_bias=False,
            mlp_bias=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread, centre = (0.2, 1.0) if "norm" in name else (1.0, 0.0) if "embed_tokens" in name else (0.25, 0.0)
            parameter.copy_(centre + spread * torch.randn_like(parameter))
    return model.eval()


def make_batches() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    batches = []
    for _ in range(BATCHES):
        prompts = [draw(2, 8) for _ in range(ROWS)]
        lengths = [prompt + draw(1, 6) for prompt in prompts]
        lengths[0], prompts[0] = LONGEST, 6  # one row fills the width: the others are padded
        tokens = [[draw(3, VOCABULARY) for _ in range(length)] + [0] * (LONGEST - length) for length in lengths]
        batches.append({"tokens": tokens, "prompt_lengths": prompts, "lengths": lengths})
    return batches


def inputs(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    tokens = torch.tensor(batch["tokens"])
    column = torch.arange(tokens.shape[1])[None]
    length = torch.tensor(batch["lengths"])[:, None]
    prompt = torch.tensor(batch["prompt_lengths"])[:, None]
    labels = torch.where((column >= prompt) & (column < length), tokens, -100)
    return {"input_ids": tokens, "attention_mask": (column < length).long(), "labels": labels}


def write_base(model: LlamaForCausalLM, batch: dict[str, Any], folder: Path) -> None:
    folder.mkdir()
    config = model.config.to_dict() | {"model_type": "llama", "rope_theta": 10000.0, "torch_dtype": "float32"}
    keep = [
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta",
        "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "bos_token_id", "eos_token_id",
        "pad_token_id", "torch_dtype",
    ]  # fmt: skip
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"]} | {key: config[key] for key in keep})
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items() if "rotary" not in name},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with torch.no_grad():
        out = model(**inputs(batch))
    save_file({"logits": out.logits.contiguous(), "loss": out.loss}, folder / "logits.safetensors")


def load_base(folder: Path) -> LlamaForCausalLM:
    with quiet():
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.config._name_or_path = ""  # a machine's path has no place in a committed adapter_config.json
    model.name_or_path = ""
    return model.eval()


# One forward and backward pass per method


def attach(config: PeftConfig, noise: float | None, base: Path, seed: int = 2) -> PeftModel:
    torch.manual_seed(seed)
    with quiet():
        model = get_peft_model(load_base(base), config)
    if noise is not None:
        with torch.no_grad():
            for parameter in trained(model).values():
                parameter.copy_(noise * torch.randn_like(parameter))
    return model.eval()  # no dropout; gradients flow all the same


def trained(model: PeftModel) -> dict[str, torch.Tensor]:
    """The trained parameters under the names that PEFT's checkpoints use (without the adapter's name)."""
    return {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}


def real_logits(model: PeftModel, batch: dict[str, Any]) -> torch.Tensor:
    """Logits of the batch's own columns: prompt tuning and P-tuning return some for their virtual tokens too.

    Without labels: PEFT's AdaLoRA looks for its trainable adapter when it is given some, and fails on a loaded one.
    """
    batch_inputs = {name: value for name, value in inputs(batch).items() if name != "labels"}
    with torch.no_grad():
        return model(**batch_inputs).logits[:, -LONGEST:].contiguous()


def losses(model: PeftModel, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(what PEFT minimises, the task's part of it, AdaLoRA's orthogonality before its weight)."""
    config = model.peft_config["default"]
    total = model(**inputs(batch)).loss
    weight = getattr(config, "orth_reg_weight", 0.0)
    if not weight:
        return total, total, torch.zeros(())
    config.orth_reg_weight = 0.0
    with torch.no_grad():
        task = model(**inputs(batch)).loss
    config.orth_reg_weight = weight
    return total, task, (total.detach() - task) / weight


def write_case(config: PeftConfig, noise: float | None, batch: dict[str, Any], base: Path, folder: Path) -> None:
    model = attach(config, noise, base)
    total, task, orthogonality = losses(model, batch)
    total.backward()
    values = {"logits": real_logits(model, batch)}
    for name, parameter in trained(model).items():
        values[f"parameter.{name}"] = parameter.detach().clone().contiguous()
        values[f"gradient.{name}"] = parameter.grad.clone().contiguous()
        assert parameter.grad.abs().max() > 1e-4, f"{folder.name}: no gradient reaches {name}"
    folder.mkdir()
    save_file(values, folder / "values.safetensors")
    write_json(
        folder / "case.json",
        {"loss": total.item(), "task_loss": task.item(), "orthogonality": orthogonality.item()},
    )
    save_adapter(model, base, batch, folder / "adapter")
    print(f"{folder.name:18} loss {total.item():.6f}")


def save_adapter(model: PeftModel, base: Path, batch: dict[str, Any], folder: Path) -> None:
    """The folder as `save_pretrained` writes it, minus its model card; proven to give the same logits when loaded."""
    with quiet():
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        loaded = PeftModel.from_pretrained(load_base(base), folder).eval()
    difference = (real_logits(loaded, batch) - real_logits(model, batch)).abs().max().item()
    assert difference < 1e-4, f"{folder}: the original itself differs by {difference} after loading"


# One whole AdaLoRA run


def write_adalora_run(batches: list[dict[str, Any]], base: Path, folder: Path) -> None:
    config = AdaLoraConfig(
        init_r=6, target_r=3, lora_alpha=12, target_modules=LINEAR, tinit=5, tfinal=10, deltaT=2, beta1=0.85,
        beta2=0.85, orth_reg_weight=0.5, total_step=RUN["steps"], task_type="CAUSAL_LM",
    )  # fmt: skip
    model = attach(config, 0.3, base, seed=RUN["seed"])
    allocator = model.base_model.rankallocator
    optimizer = torch.optim.SGD(trained(model).values(), lr=RUN["learning_rate"])
    values = {f"initial.{n}": p.detach().clone().contiguous() for n, p in trained(model).items()}
    steps = []
    for step in range(RUN["steps"]):
        total, task, orthogonality = losses(model, batches[step % len(batches)])
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        budget, may_prune = allocator.budget_schedule(step)
        prunes = step == RUN["steps"] - config.tfinal or (step < RUN["steps"] - config.tfinal and may_prune)
        with scores_of(allocator) as scores:
            model.base_model.update_and_allocate(step)
        pattern = config.rank_pattern
        margin = None
        if prunes:
            margin = threshold_margin(torch.cat(list(scores.values())), allocator.init_bgt - budget)
            assert margin > 2e-3, f"step {step}: scores within {margin} of the threshold: choose another seed"
            for name, score in scores.items():
                values[f"score.{step}.{name}"] = score.clone()
        steps.append(
            {
                "step": step,
                "task_loss": task.item(),
                "orthogonality": orthogonality.item(),
                "budget": budget,
                "pruned": prunes,
                "rank_pattern": None if pattern is None else {module(name): bits for name, bits in pattern.items()},
                "margin": margin,
            }
        )
    values |= {f"final.{n}": p.detach().clone().contiguous() for n, p in trained(model).items()}
    values["logits"] = real_logits(model, batches[0])
    folder.mkdir()
    save_file(values, folder / "values.safetensors")
    schedule = {key: getattr(config, key) for key in ("tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step")}
    write_json(folder / "run.json", {"training": RUN, "schedule": schedule, "steps": steps})
    save_adapter(model, base, batches[0], folder / "adapter")
    print(f"{folder.name:18} loss {steps[0]['task_loss']:.4f} -> {steps[-1]['task_loss']:.4f}")


@contextlib.contextmanager
def scores_of(allocator: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Collect each module's triplet scores while the allocator prunes, as its own functions compute them."""
    scores: dict[str, torch.Tensor] = {}
    original = allocator.mask_to_budget

    def listen(model: torch.nn.Module, budget: int) -> dict[str, list[bool]]:
        for name in allocator.name_set:
            a, e, b = (allocator._element_score(name % part) for part in ("lora_A", "lora_E", "lora_B"))
            both = torch.cat([a.mean(dim=1, keepdim=True), b.mean(dim=0).view(-1, 1)], dim=1)
            scores[module(name % "lora_E")] = allocator._combine_ipt(e, both)
        return original(model, budget)

    allocator.mask_to_budget = listen
    try:
        yield scores
    finally:
        allocator.mask_to_budget = original


def threshold_margin(scores: torch.Tensor, pruned: int) -> float:
    """Relative distance between the last triplet pruned and the first one kept."""
    ordered = scores.sort().values
    return ((ordered[pruned] - ordered[pruned - 1]) / ordered[pruned]).item()


def module(name: str) -> str:
    """model.layers.0.self_attn.q_proj.lora_E.default -> model.layers.0.self_attn.q_proj"""
    return name.removeprefix("base_model.model.").split(".lora_")[0]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1 if isinstance(value, dict) else None) + "\n")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    main()
