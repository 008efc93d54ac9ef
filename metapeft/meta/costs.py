"""What training a configuration costs before it is trained: seconds, peak memory, bytes on disk.

Seconds come from counting passes over tokens (trunk once per example, layers above it forward and backward, output head
at completion positions, evaluations) and this machine's measured speed; memory from the tensors that are alive at the
peak; bytes are exact for a fixed rank (AdaLoRA's ranks end up different per layer: its average is used).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from metapeft.peft.adalora import AdaLoRAConfig
from metapeft.peft.lora import LoRAConfig, pattern
from metapeft.peft.p_tuning import PTuningConfig
from metapeft.peft.prefix import PrefixConfig
from metapeft.profiling import Profile
from metapeft.profiling.shapes import Shapes
from metapeft.profiling.speed import Speed
from metapeft.training.configuration import TrainConfig, split
from metapeft.training.trial import Trial

MB = 2**20
RECENT = 100  # trials that times are corrected by, and memory
SHRINK = 1.0
WAITING = 1.15  # wall seconds times cores over processor seconds, where a training has the machine for itself
PADDING = 1.2  # time per token: padding within groups of similar length, and workers that wait for each other
SAMPLE = 64  # validation examples scored during training
CHUNK_TOKENS = 288  # tokens evaluated at once, per worker
TRUNK_BYTES = 2**29  # of hidden states kept in memory
# A forward and backward pass with low-rank matrices on every layer against one without; AdaLoRA adds its orthogonality
# loss and rank allocation, whose cost per step depends on the matrices, not on the tokens.
LOW_RANK = 1.15
TRIPLETS = 2.0


@dataclass(frozen=True)
class _Ratio:
    """Of one trial: the logarithm of what was measured over what was predicted."""

    method: str
    version: str
    log: float


@dataclass(frozen=True)
class Cost:
    """Of one training with its evaluations, as a trial reports it."""

    seconds: float
    peak_memory_mb: float
    adapter_bytes: int
    trained_parameters: int


def cost(configuration: dict[str, Any], profile: Profile, speed: Speed, steps: int) -> Cost:
    """Raises UserError when the configuration is wrong or does not fit the backbone."""
    method, train = split(configuration)
    matrices = adapted(method, profile.shapes)
    parameters = _parameters(method, profile.shapes, matrices)
    return Cost(
        seconds=_seconds(method, train, profile, speed, steps, matrices),
        peak_memory_mb=_memory(method, train, profile, speed, steps, parameters, bool(matrices)) / MB,
        adapter_bytes=adapter_bytes(method, profile.shapes, matrices),
        trained_parameters=parameters,
    )


def corrected(
    configurations: Sequence[dict[str, Any]],
    profile: Profile,
    speed: Speed,
    steps: int,
    trials: Sequence[Trial],
    profiles: Mapping[tuple[str, str], Profile],
) -> list[Cost]:
    """Costs, corrected by how long trials of this backbone really took on this processor, whose speed with it was
    measured, and by the memory of all on this kind of device.

    Of all trials, then of the method's, then of the task's, in turn: what is left to correct is the median ratio, drawn
    towards none as if SHRINK more trials had gone as predicted.
    """
    times: list[_Ratio] = []
    memories: list[_Ratio] = []
    mine = [t for t in trials if t.status == "ok" and t.seconds > 0 and t.device == speed.measured.get("device")]
    for trial in reversed(mine):
        here = (trial.backbone, trial.versions.get("processor")) == (profile.backbone, speed.measured.get("processor"))
        timed, sized = here and len(times) < RECENT, len(memories) < RECENT
        same = (trial.task_version, trial.backbone) == (profile.task_version, profile.backbone)
        known = profile if same else profiles.get((trial.task_version, trial.backbone))
        if known is None or not (timed or sized):
            continue
        before = cost(trial.configuration, known, speed, trial.budget)
        if sized:
            larger = math.log(max(1.0, trial.peak_memory_mb) / max(1.0, before.peak_memory_mb))
            memories.append(_Ratio(trial.method, trial.task_version, larger))
        if timed:
            longer = math.log(undisturbed(trial, speed) / max(1e-3, before.seconds))
            times.append(_Ratio(trial.method, trial.task_version, longer))

    def factor(ratios: list[_Ratio], method: str) -> float:
        found = 0.0
        for subset in (
            ratios,
            [r for r in ratios if r.method == method],
            [r for r in ratios if r.version == profile.task_version],
        ):
            if subset:
                found += median(r.log - found for r in subset) * len(subset) / (len(subset) + SHRINK)
        return math.exp(found)

    by_method = {c["method"]: (factor(times, c["method"]), factor(memories, c["method"])) for c in configurations}
    found = []
    for configuration in configurations:
        c = cost(configuration, profile, speed, steps)
        time, memory = by_method[configuration["method"]]
        found.append(Cost(c.seconds * time, c.peak_memory_mb * memory, c.adapter_bytes, c.trained_parameters))
    return found


def undisturbed(trial: Trial, speed: Speed) -> float:
    """Seconds that a trial takes where no other program is at work: on a CPU the processor's time tells them."""
    workers = float(speed.measured.get("workers", 1))
    if trial.device != "cpu" or trial.cpu_seconds <= 0:
        return trial.seconds
    return min(trial.seconds, WAITING * trial.cpu_seconds / workers)


def adapted(method: Any, shapes: Shapes) -> dict[str, tuple[int, int]]:
    """Path -> (outputs, inputs) of the linear layers that a matrix method changes; empty for the others."""
    if not isinstance(method, LoRAConfig | AdaLoRAConfig):
        return {}
    lowest = _lowest(method, shapes)
    found = {}
    for index, layer in list(enumerate(shapes.each()))[lowest:]:
        for name, size in layer.linear.items():
            if not method.targets or any(name == t or name.endswith(f".{t}") for t in method.targets):
                found[f"{shapes.root}.{index}.{name}"] = size
    return found


def adapter_bytes(method: Any, shapes: Shapes, matrices: dict[str, tuple[int, int]]) -> int:
    """Size of adapter_model.safetensors (format: 8 bytes, a JSON header padded to 8, the tensors in float32)."""
    tensors: dict[str, tuple[int, ...]] = {}
    for path, (outputs, inputs) in matrices.items():
        name = f"base_model.model.{path}.lora_"
        if isinstance(method, LoRAConfig):
            rank = pattern(method.rank_pattern, path, method.rank)
            tensors |= {f"{name}A.weight": (rank, inputs), f"{name}B.weight": (outputs, rank)}
        else:
            rank = method.target_rank
            tensors |= {f"{name}A": (rank, inputs), f"{name}B": (outputs, rank), f"{name}E": (rank, 1)}
    if not matrices:
        width = 2 * shapes.depth * shapes.kv_heads * shapes.head_width
        tensors["prompt_embeddings"] = (method.tokens, width if isinstance(method, PrefixConfig) else shapes.width)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        size = 4
        for side in tensors[name]:
            size *= side
        header[name] = {"dtype": "F32", "shape": list(tensors[name]), "data_offsets": [end, end + size]}
        end += size
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-text // 8) * 8 + end


def _lowest(method: Any, shapes: Shapes) -> int:
    """The lowest layer that training changes: what lies below is computed once per example."""
    layers = getattr(method, "layers", 0)
    return shapes.depth - layers if 0 < layers < shapes.depth else 0


def _parameters(method: Any, shapes: Shapes, matrices: dict[str, tuple[int, int]]) -> int:
    if isinstance(method, LoRAConfig):
        return sum(pattern(method.rank_pattern, path, method.rank) * sum(size) for path, size in matrices.items())
    if isinstance(method, AdaLoRAConfig):
        return sum(method.initial_rank * (sum(size) + 1) for size in matrices.values())
    width, keys_values = shapes.width, 2 * shapes.depth * shapes.kv_heads * shapes.head_width
    if isinstance(method, PrefixConfig):
        if not method.projection:
            return method.tokens * keys_values
        return method.tokens * width + method.projection * (width + 1) + keys_values * (method.projection + 1)
    if isinstance(method, PTuningConfig):
        h = method.width
        if method.encoder == "mlp":
            return method.tokens * width + h * (width + 1) + h * (h + 1) + width * (h + 1)
        lstm = 4 * h * (width + h + 1) + 4 * h * (2 * h + h + 1)
        return method.tokens * width + 2 * lstm + 2 * h * (2 * h + 1) + width * (2 * h + 1)
    return int(method.tokens * width)


def _seconds(
    method: Any,
    train: TrainConfig,
    profile: Profile,
    speed: Speed,
    steps: int,
    matrices: dict[str, tuple[int, int]],
) -> float:
    features, shapes = profile.features, profile.shapes
    completion = features["completion_tokens_mean"]
    shared = features["shared_tokens"]
    length = PADDING * (features["prompt_tokens_mean"] - shared + completion - 1)
    batch = min(train.batch_size, features["train_examples"])
    validation, test = features["validation_examples"], features["test_examples"]
    lowest = _lowest(method, shapes)
    weights = [layer.parameters for layer in shapes.each()]
    above = sum(weights[lowest:]) / sum(weights)
    workers = int(speed.measured.get("workers", 1))

    # What every prompt begins with goes through the layers once per step and worker.
    step = (batch * length + workers * shared) * above * speed.gradient + batch * completion * speed.head_gradient
    if matrices:
        step *= LOW_RANK
    elif not isinstance(method, PrefixConfig):  # and so do virtual tokens
        step += method.tokens * workers * speed.gradient
    step = max(step, speed.step)
    if isinstance(method, AdaLoRAConfig):
        # Gram matrices of both factors, forward and backward, and a dozen passes over the parameters for importance.
        flops = sum(6 * method.initial_rank**2 * sum(size) for size in matrices.values())
        step += TRIPLETS * flops * speed.gradient / (4 * sum(weights)) + len(matrices) * TRIPLETS * 1e-4
    sampled = min(SAMPLE, validation)
    evaluated = train.evaluations * sampled + validation - sampled + test
    scoring = evaluated * (length * above * speed.forward + completion * speed.head_forward)
    trunk = (min(features["train_examples"], steps * batch) + validation + test) * length * (1 - above) * speed.forward
    return float(steps * step + scoring + trunk)


def _memory(
    method: Any, train: TrainConfig, profile: Profile, speed: Speed, steps: int, parameters: int, matrices: bool
) -> float:
    """Bytes alive at the peak: weights, adapter with its optimizer, and the larger of a step and an evaluation."""
    features, shapes = profile.features, profile.shapes
    completion = features["completion_tokens_p90"]
    shared = features["shared_tokens"]
    length = features["prompt_tokens_p90"] - shared + completion - 1
    batch = min(train.batch_size, features["train_examples"]) / train.accumulate
    workers = int(speed.measured.get("workers", 1))
    elements = sum(layer.parameters for layer in shapes.each()) + shapes.vocabulary * shapes.width
    element = 4 if shapes.weight_bytes / elements > 3 else 2
    lowest = _lowest(method, shapes)

    before = shared + getattr(method, "tokens", 0)
    kept = [_kept(layer.linear, shapes, length, before, matrices) for layer in shapes.each()]
    layers = max(kept) + shapes.depth * shapes.width if train.checkpoint else sum(kept[lowest:])
    logits = batch * completion * shapes.vocabulary * (element + 3 * 4)
    step = (batch * length + workers * shared) * layers * element + logits
    at_once = min(CHUNK_TOKENS, length * (features["validation_examples"] + features["test_examples"]))
    rows = workers * at_once / max(1.0, length) * completion
    scoring = workers * at_once * max(kept) * element + rows * shapes.vocabulary * (element + 2 * 4)
    seen = min(features["train_examples"], steps * train.batch_size)
    cached = (seen, features["validation_examples"], features["test_examples"]) if lowest else ()
    trunk = min(TRUNK_BYTES, sum(examples * length * shapes.width * element for examples in cached))
    return shapes.weight_bytes + 5 * 4 * parameters + trunk + max(step, scoring)


def _kept(linear: dict[str, tuple[int, int]], shapes: Shapes, length: float, before: float, matrices: bool) -> float:
    """Elements per token that a layer's backward pass needs: what its linear layers put out, an activation as wide as
    the widest, the attention's scores and probabilities, keys and values joined to those of the tokens that come before
    every example; with trained matrices also what the linear layers take in."""
    widest = max(max(size) for size in linear.values())
    outputs = sum(outputs for outputs, _ in linear.values())
    attention = 2 * (before + length) * shapes.width / shapes.head_width
    if before:
        attention += 2 * shapes.kv_heads * shapes.head_width * (1 + before / max(1.0, length))
    return outputs + widest + attention + (4 * shapes.width + 2 * widest if matrices else 0)
