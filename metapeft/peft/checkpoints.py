"""Adapter folders: reading three formats, writing ours, converting between them.

Our folder is a Hugging Face PEFT folder (`huggingface`) that also holds `metapeft.json` (the exact configuration and
the caller's metadata) and a manifest (`folder`). What only training needs (encoders of P-tuning and prefix tuning,
AdaLoRA's moving averages) belongs to the trainer's resume state; PEFT drops it too.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from metapeft.errors import UserError
from metapeft.peft import folder as folders
from metapeft.peft import huggingface, mlx_lm, parse
from metapeft.peft.saved import Format, Saved, renamed

OURS = "metapeft.json"
MATRICES, VIRTUAL = "matrices.", "virtual."  # before the names of a stack's files
FORMATS: tuple[Format, ...] = ("metapeft", "peft", "mlx-lm")


def detect(folder: Path) -> Format:
    """Which format a folder has, by its files. Raises UserError when it holds no adapter or only a pickled one."""
    return folders.stable(folder, _detect)


def read(folder: Path) -> Saved:
    """The adapter in a folder of ours (checked against its manifest), of Hugging Face PEFT's or of mlx-lm's.

    Raises UserError with one sentence on anything that is missing, damaged, inconsistent or not supported.
    """
    return folders.stable(folder, _read)


def _detect(place: Path) -> Format:
    if (place / OURS).exists() or (place / folders.MANIFEST).exists():
        return "metapeft"
    if (place / huggingface.WEIGHTS).exists():
        return "peft"
    if (place / mlx_lm.WEIGHTS).exists():
        return "mlx-lm"
    if (place / huggingface.PICKLE).exists():
        raise UserError(
            f"{place / huggingface.PICKLE} is a pickle, which can run code when it is opened; save the adapter again"
            " with PEFT's save_pretrained, which writes safetensors"
        )
    raise UserError(f"{place} holds no adapter ({huggingface.WEIGHTS} or {mlx_lm.WEIGHTS}); check the path")


def _read(place: Path) -> Saved:
    found = _detect(place)
    if found == "metapeft":
        return _decode(folders.sealed_files(place), place)
    weights = huggingface.WEIGHTS if found == "peft" else mlx_lm.WEIGHTS
    files = {name: folders.read(place / name) for name in (huggingface.CONFIG, weights)}
    return huggingface.decode(files, place) if found == "peft" else mlx_lm.decode(files, place)


def write(folder: Path, saved: Saved) -> None:
    """Writes our format; an adapter that is already there is replaced in one step (see `folder.publish`)."""
    folders.publish(folder, _files(saved))


def _files(saved: Saved) -> dict[str, bytes]:
    """Two adapters in one folder have names of their own: PEFT would take the one it knows for the whole."""
    if saved.virtual is not None:
        halves = {MATRICES: _files(replace(saved, virtual=None)), VIRTUAL: _files(saved.virtual)}
        return {half + name: content for half, files in halves.items() for name, content in files.items()}
    ours = {"format": 1, "configuration": saved.config.to_json(), "metadata": saved.metadata}
    if names := {new: path for path in saved.modules() if (new := huggingface.theirs(path)) != path}:
        ours["modules"] = names
    return huggingface.encode(saved) | {OURS: json.dumps(ours, indent=2, sort_keys=True).encode()}


def _decode(files: dict[str, bytes], folder: Path) -> Saved:
    if any(name.startswith(VIRTUAL) for name in files):
        matrices, virtual = (
            _decode({n.removeprefix(half): content for n, content in files.items() if n.startswith(half)}, folder)
            for half in (MATRICES, VIRTUAL)
        )
        return replace(matrices, virtual=virtual)
    for name in (huggingface.CONFIG, huggingface.WEIGHTS, OURS):
        if name not in files:
            raise UserError(f"{folder / folders.MANIFEST} does not list {name}; the adapter was damaged, save it again")
    saved = huggingface.decode(files, folder)
    ours = huggingface.parse_json(files[OURS], folder / OURS)
    try:
        values = dict(ours["configuration"])
        method, metadata = values.pop("method"), dict(ours["metadata"])
        saved = renamed(saved, dict(ours.get("modules", {})))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / OURS} has no configuration and metadata; save the adapter again") from error
    if method != saved.config.method:
        raise UserError(
            f"{folder / OURS} says {method} and {huggingface.CONFIG} says {saved.config.method}; save it again"
        )
    return replace(saved, config=parse(method, values), metadata=metadata, format="metapeft")


def to_mlx_lm(folder: Path, saved: Saved) -> None:
    """Writes a folder for `mlx_lm --adapter-path`. Raises UserError for methods that mlx-lm does not have."""
    _alone(saved, "mlx-lm")
    folders.publish(folder, mlx_lm.encode(saved), sealed=False)


def _alone(saved: Saved, whose: str) -> None:
    if saved.virtual is not None:
        raise UserError(
            f"{whose} cannot hold this adapter: {saved.virtual.config.method} on {saved.config.method}; serve it with"
            " metapeft, or train one method without --switch"
        )


def to_peft(folder: Path, saved: Saved) -> None:
    """Writes a folder for `PeftModel.from_pretrained`. Raises UserError for a stack with virtual tokens."""
    _alone(saved, "Hugging Face PEFT")
    folders.publish(folder, huggingface.encode(saved), sealed=False)


def convert(source: Path, destination: Path, to: Format, backbone: str | None = None) -> Saved:
    """Reads an adapter in any format and writes it in another; returns what was read.

    `backbone` is the base model's name to record, where the source has none or a wrong one. Raises UserError, also
    where the destination is the source: what only its format holds would be lost.
    """
    if destination.exists() and source.exists() and destination.samefile(source):
        raise UserError(f"{destination} is the adapter itself, which would be lost; choose another folder")
    saved = read(source)
    if backbone is not None:
        saved = replace(saved, metadata=saved.metadata | {"backbone": backbone})
    writers = {"metapeft": write, "peft": to_peft, "mlx-lm": to_mlx_lm}
    if to not in writers:
        raise UserError(f"unknown adapter format {to!r}; choose from {', '.join(FORMATS)}")
    if destination.exists() and (other := _foreign(destination)) is not None:
        raise UserError(f"{destination} exists and {other}; choose another name, or remove it first")
    writers[to](destination, saved)
    return saved


def _foreign(folder: Path) -> str | None:
    """Why a folder is none that was written here: what is in it is somebody's."""
    if not folder.is_dir():
        return "is no folder"
    files = (huggingface.CONFIG, huggingface.WEIGHTS, mlx_lm.CONFIG, mlx_lm.WEIGHTS, OURS)
    ours = {folders.MANIFEST, *(part + name for part in ("", MATRICES, VIRTUAL) for name in files)}
    others = sorted(path.name for path in folder.iterdir() if path.name not in ours or path.is_dir())
    return f"holds {others[0]}, which belongs to no adapter" if others else None
