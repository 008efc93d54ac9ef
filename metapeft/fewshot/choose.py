"""Choosing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

COLD: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "learning_rate": 2e-3, "rank": 8, "alpha": 16.0, "layers": 10},
    "prefix": {"method": "prefix", "learning_rate": 1e-2, "tokens": 16},
}


@dataclass
class Strategy:
    name: str
