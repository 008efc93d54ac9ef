"""What does a step of the server cost? Native steps beside MLX's with a fast BLAS, on one thread, in processor time.

    python benchmarks/steps.py [--quick] [--json FILE] [--rows 1,8,32]

Processor time of one thread says little about the speed of two, but it stays the same while other programs want the
machine: `benchmarks/serving.py` measures what a client sees. Prompts have 22 tokens; weights are float32 for both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"

from metapeft import backbones
from metapeft.kernels.serve import Native, Part, native
from metapeft.runtime import mx, nn

PROMPT = list(range(5, 27))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", default="1,8,32", help="sequences at the same time")
    options = parser.parse_args()
    model = backbones.load("smollm2-135m-instruct").model
    packed = native(model, threads=1)
    if packed is None:
        raise SystemExit(
            "native steps need a CPU with AVX2 or AVX-512, a C++ compiler and a fast BLAS; see metapeft doctor"
        )
    steps = 4 if options.quick else 12
    rows = []
    for count in map(int, options.rows.split(",")):
        ours, theirs = with_native(packed, count, steps), with_mlx(model, count, steps)
        for name, (prompt, step) in (("native", ours), ("mlx", theirs)):
            rows.append(
                {
                    "steps": name,
                    "rows": count,
                    "prompt_ms_per_token": round(1000 * prompt / count / len(PROMPT), 2),
                    "step_ms": round(1000 * step, 1),
                }
            )
            print(rows[-1], flush=True)
    faster = [b["step_ms"] / a["step_ms"] for a, b in zip(rows[::2], rows[1::2], strict=True)]
    target = {"name": "least of mlx over native, a step", "value": round(min(faster), 2), "target": ">= 1"}
    target["met"] = min(faster) >= 1
    print(target)
    if options.json:
        machine = {"platform": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()}
        command = [Path(sys.argv[0]).name, *sys.argv[1:]]
        record: dict[str, Any] = {"machine": machine, "command": command, "rows": rows, "targets": [target]}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


def with_native(packed: Native, count: int, steps: int) -> tuple[float, float]:
    """Processor seconds to read the prompts, and of a step (the least)."""
    caches = [packed.cache(len(PROMPT) + steps) for _ in range(count)]
    prompt = spent(lambda: packed.step([Part(PROMPT, cache) for cache in caches]))
    return prompt, min(spent(lambda: packed.step([Part([7], cache) for cache in caches])) for _ in range(steps))


def with_mlx(model: nn.Module, count: int, steps: int) -> tuple[float, float]:
    from mlx_lm.models.cache import BatchKVCache

    caches = [BatchKVCache([0] * count) for _ in model.layers]
    prompt = spent(lambda: mx.eval(model(mx.array([PROMPT] * count), cache=caches)[:, -1]))
    one = mx.array([[7]] * count)
    return prompt, min(spent(lambda: mx.eval(mx.argmax(model(one, cache=caches)[:, -1], -1))) for _ in range(steps))


def spent(work: Callable[[], Any]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


if __name__ == "__main__":
    raise SystemExit(main())
