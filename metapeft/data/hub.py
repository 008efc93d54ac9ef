"""Datasets of the Hugging Face hub, and folders that its `datasets` library saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metapeft.data.rows import Row, Shape, Table, listed, parse
from metapeft.errors import MetapeftError, UserError

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip


def read_hub(task: str) -> tuple[Shape, dict[str, list[Row]], list[str], str]:
    """Row shape, rows per split, notes and licence of `owner/name`, or `owner/name:configuration`.

    Works without a network when `datasets` has the dataset in its cache. Raises UserError when it cannot be had,
    MetapeftError while the hub is not reached.
    """
    import datasets

    name, _, configuration = task.partition(":")
    answered, licence = ask(name)
    before = datasets.config.HF_HUB_OFFLINE
    try:
        # Without this, an unreachable hub is asked six times, for 25 seconds, before the cache is looked at.
        datasets.config.HF_HUB_OFFLINE = before or not answered
        loaded = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # the library raises its own, the hub's, requests', and ValueError for a configuration
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        if not answered:
            raise MetapeftError(
                f"cannot load the dataset {task!r} (the hub cannot be reached and the dataset is not in the cache); "
                "check the network and try again, or give a file"
            ) from error
        raise UserError(
            f"cannot load the dataset {task!r} ({reason}); check its id (owner/name or owner/name:configuration), "
            "and for a private one `hf auth login`, or give a file"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    return (*split_tables(dict(loaded), task), licence)


def read_saved(folder: Path) -> tuple[Shape, dict[str, list[Row]], list[str]]:
    """As `split_tables`, of a folder that `save_to_disk` made. Raises UserError when it is broken."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # missing or broken Arrow files give OSError, ArrowInvalid, JSON errors, …
        raise UserError(f"{folder} is not a readable saved dataset ({str(error)[:120]}); save it again") from error
    return split_tables(dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}, str(folder))


def split_tables(loaded: dict[Any, Any], source: str) -> tuple[Shape, dict[str, list[Row]], list[str]]:
    """Row shape, rows by our names of splits, and notes on the splits that are not used.

    A dataset with a single split of any name is one to be split. Raises UserError for splits that mean the same.
    """
    meant = {name: SPLIT_NAMES[str(name).lower()] for name in loaded if str(name).lower() in SPLIT_NAMES}
    for split in set(meant.values()):
        if len(same := [str(name) for name, means in meant.items() if means == split]) > 1:
            raise UserError(f"{source} has several splits for {split} ({listed(same)}); keep one of them")
    if "train" not in meant.values():
        if len(loaded) != 1:
            raise UserError(f"{source} has no split 'train' (found {listed(loaded)}); name one of them train")
        meant = dict.fromkeys(loaded, "train")
    tables = {
        split: parse(records(loaded[name]), f"{source} ({name})", "row")
        for name, split in meant.items()
        if labelled(loaded[name])
    }
    if "train" not in tables:
        raise UserError(f"{source}: the training split has no rows with a label; choose another dataset")
    unlabelled = [str(name) for name, split in meant.items() if split not in tables]
    notes = [f"not used: {listed(unlabelled)} (no rows, or none with a label)"] if unlabelled else []
    if others := [str(name) for name in loaded if name not in meant]:
        notes.append(f"not used: {listed(others)} (only train, validation and test are)")
    return (*same_shape(tables, source), notes)


def same_shape(tables: dict[str, Table], source: str) -> tuple[Shape, dict[str, list[Row]]]:
    """One shape for all splits. Raises UserError when they differ."""
    shape = tables["train"].shape
    for name, table in tables.items():
        if table.shape != shape:
            raise UserError(f"{source}: {name} is {table.shape} while train is {shape}; use one row format")
    return shape, {name: list(table.rows) for name, table in tables.items()}


def labelled(data: Any) -> bool:
    """False for an empty split, and for one whose labels are withheld (all -1, as benchmarks do with test splits)."""
    if not len(data):
        return False
    return not (has_names(data) and set(data["label"]) == {-1})


def has_names(data: Any) -> bool:
    import datasets

    return isinstance(data.features.get("label"), datasets.ClassLabel)


def records(data: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with the names of class labels instead of their numbers; -1 is no label."""
    names = data.features["label"].names if has_names(data) else None
    for number, record in enumerate(data, start=1):
        if names is not None and record["label"] is not None:
            record = {**record, "label": names[record["label"]] if record["label"] >= 0 else None}
        yield number, record


def ask(name: str) -> tuple[bool, str]:
    """Whether the hub answers within seconds, with whatever answer, and the licence that it states ("" for none)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        card = HfApi().dataset_info(name, timeout=8).card_data
    except (HfHubHTTPError, ValueError):  # it said no, or the id is not valid: the library will say why
        return True, ""
    except Exception:  # whatever its HTTP library raises without an answer
        return False, ""
    return True, str(getattr(card, "license", None) or "")
