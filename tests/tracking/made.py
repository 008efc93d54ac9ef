"""Trials and adapter folders to log and register."""

from __future__ import annotations

from pathlib import Path

from metapeft.training.trial import Score, Trial, trial_id


def make_trial(number: int = 1, value: float = 0.9, **changes: object) -> Trial:
    configuration = {"method": "lora", "learning_rate": 1e-3 * number, "rank": 8, "targets": ["q_proj", "v_proj"]}
    values: dict[str, object] = {
        "id": trial_id("sms_spam", "0123456789abcdef", "smollm2-135m-instruct", configuration, 0, 40, 8),
        "task": "sms_spam",
        "task_version": "0123456789abcdef",
        "backbone": "smollm2-135m-instruct",
        "method": "lora",
        "configuration": configuration,
        "seed": 0,
        "budget": 40,
        "status": "ok",
        "score": Score("accuracy", value, 0.02, 300, 0.31),
        "untuned_score": Score("accuracy", 0.5, 0.03, 300, 2.0),
        "curve": [
            {
                "step": 10,
                "examples": 80,
                "seconds": 3.0,
                "train_loss": 1.5,
                "validation_loss": None,
                "validation_score": None,
            },
            {
                "step": 20,
                "examples": 160,
                "seconds": 6.0,
                "train_loss": 0.75,
                "validation_loss": 0.8,
                "validation_score": 0.7,
            },
        ],
        "seconds": 12.0,
        "started": "2026-05-01T10:00:00+00:00",
    }
    return Trial(**{**values, **changes})  # type: ignore[arg-type]


def make_adapter(folder: Path, content: str = "weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_text(content)
    (folder / "adapter_config.json").write_text("{}")
    return folder
