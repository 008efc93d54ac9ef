"""Every method against Hugging Face PEFT 0.21: logits, loss, gradients, and one whole AdaLoRA run.

The values were computed by the original (tests/reference/generate.py). The model, the batch and the trained parameters
are the same; the computation is metapeft's own, the one that its trainer and its evaluation use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from metapeft.peft import adalora, adapters, checkpoints, lora
from metapeft.peft.adalora import AdaLoRA
from metapeft.peft.base import Adapter
from metapeft.peft.p_tuning import LSTMEncoder, MLPEncoder
from metapeft.peft.prefix import Prefix, Projection
from metapeft.peft.saved import ROOT
from metapeft.peft.virtual import Table, VirtualTokens
from metapeft.runtime import mx, nn
from metapeft.training.encode import Encoded
from metapeft.training.session import Shard, completion_logits, rows_targets
from metapeft.training.trunk import Trunk, pad
from metapeft.training.workers import workers
from tests.peft import reference

TOLERANCE = 1e-4


# The trained module that holds the original's parameters, and the original's name for each of its leaves.


def _table(case: str) -> tuple[nn.Module, dict[str, str]]:
    return Table(_parameter(case, "prompt_encoder.embedding.weight")), {"value": "prompt_encoder.embedding.weight"}


def _projection(case: str) -> tuple[nn.Module, dict[str, str]]:
    names = {"embedding": "prompt_encoder.embedding.weight"}
    for ours, theirs in (("first", "0"), ("second", "2")):
        names |= {f"{ours}.{leaf}": f"prompt_encoder.transform.{theirs}.{leaf}" for leaf in ("weight", "bias")}
    return _filled(Projection(4, 16, 24, 96), case, names), names


def _mlp(case: str) -> tuple[nn.Module, dict[str, str]]:
    names = {"embedding": "prompt_encoder.embedding.weight"}
    for index in range(3):
        names |= {
            f"layers.{index}.{leaf}": f"prompt_encoder.mlp_head.{2 * index}.{leaf}" for leaf in ("weight", "bias")
        }
    return _filled(MLPEncoder(mx.zeros((5, 32)), 24), case, names), names


def _lstm(case: str) -> tuple[nn.Module, dict[str, str]]:
    """PyTorch's LSTM has two biases per gate that are only ever added: ours is their sum, with the gradient of each."""
    names = {"embedding": "prompt_encoder.embedding.weight"}
    for layer in range(2):
        for ours, end in (("forward_layers", ""), ("backward_layers", "_reverse")):
            start = "prompt_encoder.lstm_head"
            names[f"{ours}.{layer}.Wx"] = f"{start}.weight_ih_l{layer}{end}"
            names[f"{ours}.{layer}.Wh"] = f"{start}.weight_hh_l{layer}{end}"
            names[f"{ours}.{layer}.bias"] = f"{start}.bias_ih_l{layer}{end}"
    for index in range(2):
        names |= {
            f"layers.{index}.{leaf}": f"prompt_encoder.mlp_head.{2 * index}.{leaf}" for leaf in ("weight", "bias")
        }
    module = _filled(LSTMEncoder(mx.zeros((5, 32)), 12), case, names)
    for layers, end in ((module.forward_layers, ""), (module.backward_layers, "_reverse")):
        for index, layer in enumerate(layers):
            layer.bias = layer.bias + _parameter(case, f"prompt_encoder.lstm_head.bias_hh_l{index}{end}")
    return module, names


MODULES: dict[str, Callable[[str], tuple[nn.Module, dict[str, str]]]] = {
    "prompt": _table,
    "prefix": _table,
    "prefix_projection": _projection,
    "p_tuning_mlp": _mlp,
    "p_tuning_lstm": _lstm,
}


def _parameter(case: str, name: str) -> mx.array:
    return mx.array(reference.values(case)[f"parameter.{name}"])


def _filled(module: nn.Module, case: str, names: dict[str, str]) -> nn.Module:
    """Every leaf of the module gets the original's value: a missing or unknown name is an error."""
    assert {name for name, _ in tree_flatten(module.parameters())} == set(names)
    return module.load_weights([(ours, _parameter(case, theirs)) for ours, theirs in names.items()])


def training_adapter(case: str) -> tuple[Adapter, dict[str, str]]:
    """The adapter in its trained form, and (its parameter -> the original's name)."""
    config = checkpoints.read(reference.DATA / case / "adapter").config
    if case in MODULES:
        module, names = MODULES[case](case)
        return (Prefix(config, module, [2, 2, 2], 8) if "prefix" in case else VirtualTokens(config, module)), names
    weights = reference.group(case, "parameter")
    if case == "adalora":
        return adalora.from_tensors(config, weights), _matrix_names(weights)
    return lora.from_tensors(config, weights), _matrix_names(weights)


def _matrix_names(weights: dict[str, mx.array]) -> dict[str, str]:
    names = {}
    for name in weights:
        path, part = name.removeprefix(ROOT).removesuffix(".weight").rsplit(".lora_", 1)
        names[f"deltas.{path.replace('.', '/')}.{part.lower()}"] = name
    return names


def shard(model: nn.Module, examples: list[Encoded], start: int = 0) -> Shard:
    longest = max(example.length for example in examples)
    rows, targets, spans = rows_targets(examples, longest)
    ids = mx.array([pad(example.ids[:-1], longest) for example in examples])
    hidden = None
    if start > 0:
        trunk = Trunk(model, start, examples)
        trunk.prepare(range(len(examples)), workers())
        hidden = trunk.stack(range(len(examples)), longest)
    return Shard(ids, hidden, mx.array(rows), mx.array(targets), spans)


def loss_and_gradients(
    model: nn.Module, adapter: Adapter, examples: list[Encoded], start: int = 0, checkpoint: bool = False
) -> tuple[float, Any]:
    """Task loss (token mean), and the gradient of everything that is minimised."""
    part = shard(model, examples, start)

    def loss(parameters: Any) -> tuple[mx.array, mx.array]:
        adapter.module.update(parameters)
        logits = completion_logits(model, adapter.prefix(model), part, start, checkpoint=checkpoint)
        task = nn.losses.cross_entropy(logits, part.targets, reduction="mean")
        extra = adapter.extra_loss()
        return (task if extra is None else task + extra), task

    parameters = adapter.module.trainable_parameters()
    (_, task), gradients = mx.value_and_grad(loss)(parameters)
    adapter.module.update(parameters)
    mx.eval(task, gradients)
    return float(task.item()), gradients


def assert_close(found: mx.array, expected: np.ndarray, what: str) -> None:
    difference = float(np.abs(np.array(found) - expected).max())
    assert difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())), f"{what} differs by {difference}"


@pytest.mark.parametrize("case", reference.CASES)
def test_logits_equal_the_originals_with_the_trained_form(case: str) -> None:
    model = reference.model()
    adapter, _ = training_adapter(case)
    logits = adapters.with_adapter(model, adapter)(reference.tokens())
    reference.assert_same_logits(logits, case)
    base = np.array(reference.model()(reference.tokens()))
    assert np.abs(base - np.array(logits)).max() > 0.1  # the adapter does something that an error would show in


@pytest.mark.parametrize("checkpoint", [False, True], ids=["", "recomputing"])
@pytest.mark.parametrize("case", reference.CASES)
def test_loss_and_gradients_equal_the_originals(case: str, checkpoint: bool) -> None:
    model = reference.model()
    adapter, names = training_adapter(case)
    adapter.attach(model)
    expected = reference.facts(f"{case}/case.json")
    if isinstance(adapter, AdaLoRA):
        adapter.schedule(30)
        assert adapter.extra_loss().item() == pytest.approx(expected["loss"] - expected["task_loss"], abs=TOLERANCE)
    loss, gradients = loss_and_gradients(model, adapter, reference.batch(), checkpoint=checkpoint)
    assert loss == pytest.approx(expected["task_loss"], abs=TOLERANCE)
    flat = dict(tree_flatten(gradients))
    assert set(flat) == set(names)
    for ours, theirs in names.items():
        assert_close(flat[ours], reference.values(case)[f"gradient.{theirs}"], theirs)


def test_no_trained_parameter_of_the_original_is_left_out() -> None:
    for case in reference.CASES:
        _, names = training_adapter(case)
        theirs = {name for name in reference.group(case, "parameter") if ".bias_hh_" not in name}
        assert theirs == set(names.values()), case


def test_a_cached_trunk_gives_the_originals_loss_and_gradients() -> None:
    case = "lora_top_layer"
    model = reference.model()
    adapter, names = training_adapter(case)
    adapter.attach(model)
    assert adapter.lowest_layer() == 2
    loss, gradients = loss_and_gradients(model, adapter, reference.batch(), start=2)
    assert loss == pytest.approx(reference.facts(f"{case}/case.json")["task_loss"], abs=TOLERANCE)
    flat = dict(tree_flatten(gradients))
    for ours, theirs in names.items():
        assert_close(flat[ours], reference.values(case)[f"gradient.{theirs}"], theirs)


@pytest.mark.parametrize("case", ["lora", "lora_rslora", "lora_patterns", "lora_top_layer", "adalora"])
def test_merged_weights_give_the_originals_logits(case: str) -> None:
    model = reference.model()
    adapter, _ = training_adapter(case)
    adapter.attach(model)
    adapter.detach(model)
    adapter.merge(model)
    reference.assert_same_logits(model(reference.tokens()), case)


def test_an_adalora_run_allocates_ranks_as_the_original_does() -> None:
    """Thirty steps of plain gradient descent on three batches in turn; see `write_adalora_run` in generate.py."""
    run = reference.facts("adalora_run/run.json")
    schedule, training = run["schedule"], run["training"]
    config = checkpoints.read(reference.DATA / "adalora_run" / "adapter").config
    initial = reference.group("adalora_run", "initial")
    model = reference.model()
    adapter = adalora.from_tensors(config, initial)
    adapter.attach(model)
    adapter.schedule(training["steps"])
    assert (adapter.initial_steps, adapter.final_steps) == (schedule["tinit"], schedule["tfinal"])
    assert adapter.config.interval == schedule["deltaT"]
    pruned = []
    for expected in run["steps"]:
        step = expected["step"]
        loss, gradients = loss_and_gradients(model, adapter, reference.batch(step % 3))
        assert loss == pytest.approx(expected["task_loss"], abs=5e-4), step
        weight = adapter.config.orthogonality
        assert adapter.extra_loss().item() == pytest.approx(weight * expected["orthogonality"], abs=5e-4), step
        updated = tree_map(lambda p, g: p - training["learning_rate"] * g, adapter.module.parameters(), gradients)
        adapter.module.update(updated)
        adapter.after_step(step, {path.replace("/", "."): g for path, g in gradients["deltas"].items()})
        mx.eval(adapter.module.parameters())
        assert adapter.budget(step)[0] == expected["budget"], step
        masks = None if adapter.kept is None else {path: keep[:, 0].tolist() for path, keep in adapter.kept.items()}
        assert masks == expected["rank_pattern"], step
        if expected["pruned"]:
            pruned.append(step)
            assert sum(adapter.ranks().values()) == expected["budget"]
            for path, theirs in reference.group("adalora_run", f"score.{step}").items():
                found = np.array(adapter.scores()[path])
                np.testing.assert_allclose(found, theirs, rtol=2e-3, err_msg=f"{path}, step {step}")
    assert pruned == [6, 8, 10, 12, 14, 16, 18, 20]
    for name, value in adalora.tensors(adapter).items():
        assert_close(value, reference.values("adalora_run")[f"final.{name}"], name)
    reference.assert_same_logits(model(reference.tokens()), "adalora_run", tolerance=5e-4)
