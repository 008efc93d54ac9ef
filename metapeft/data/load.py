"""A task from whatever names it: a file, a folder, a catalog name or a Hugging Face dataset id."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from metapeft.data import catalog, formats, hub, templates, versions
from metapeft.data.rows import Row, Shape, listed
from metapeft.data.splits import Limits, make_splits
from metapeft.data.task import SPLITS, Example, Kind, Metric, Task
from metapeft.errors import UserError
from metapeft.settings import DataSettings, home, user_path

MAX_LABELS = 500


def load_task(task: str | Path, settings: DataSettings | None = None) -> Task:
    """The task with its splits, prompts and version.

    `task` is a .jsonl, .csv or .parquet file, a folder (train/validation/test files, or one that `datasets` saved), a
    name of the catalog (fetched on first use), or a Hugging Face dataset id.
    Raises UserError for anything that cannot be used, with the place and the remedy.
    """
    if not str(task).strip():
        raise UserError("no task is given; name a file, a task of the catalog or a Hugging Face dataset")
    settings = settings or DataSettings()
    path = user_path(task)
    name, entry = str(task), catalog.find(str(task))
    if entry is not None:  # before a folder that happens to have this name: write ./NAME for that
        path = catalog.fetch(entry.name)
        shape, given, _ = read_path(path)
        return build(
            entry.name,
            shape,
            given,
            settings,
            entry.source,
            entry.licence,
            entry.family,
            versions.content_id(path),
            settings.template or entry.template or None,
            entry.metric,
        )
    if os.path.exists(path) or path.suffix.lower() in (*formats.SUFFIXES, ".json", ".txt", ".tsv", ".xlsx", ".xls"):
        shape, given, notes = read_path(path)
        inside = home().resolve().is_relative_to(path.resolve())  # what changes while we work has no identity
        identity = "" if inside else versions.content_id(path)
        return build(called(path), shape, given, settings, source=str(path), dvc_id=identity, notes=notes)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name):
        shape, given, notes, licence = hub.read_hub(name)
        return build(name, shape, given, settings, source=f"Hugging Face dataset {name}", licence=licence, notes=notes)
    raise UserError(unknown(name))


def called(path: Path) -> str:
    """The name that a file or folder gives its task. What is known of the catalog's tasks is not about a file that
    happens to be called like one."""
    whole = path.resolve()
    name = whole.name if os.path.isdir(path) else whole.stem
    return name if catalog.find(name) is None else f"my-{name}"


def read_path(path: Path) -> tuple[Shape, dict[str, list[Row]], list[str]]:
    """Row shape, rows per split and notes on what is not used: of a file (one split, "train") or a folder."""
    if not os.path.isdir(path):  # unlike Path.is_dir, False where the parent may not be read
        table = formats.read_file(path)
        return table.shape, {"train": list(table.rows)}, []
    try:
        names = sorted(path.iterdir())
        saved = (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    if saved:
        return hub.read_saved(path)
    files: dict[str, Path] = {}
    unused = []
    for file in names:
        split, readable = hub.SPLIT_NAMES.get(file.stem.lower()), file.suffix.lower() in formats.SUFFIXES
        if split is None or not readable:
            unused += [file.name] if split is not None or readable else []
            continue
        if split in files:
            raise UserError(f"{path} has two files for {split}, {files[split].name} and {file.name}; delete one")
        files[split] = file
    if "train" not in files:
        raise UserError(
            f"{path} is a folder without a train file ({' or '.join('train' + s for s in formats.SUFFIXES)})"
        )
    read = f"only files called train, validation or test are, as {', '.join(formats.SUFFIXES)}"
    notes = [f"not used: {listed(unused)} ({read})"] if unused else []
    return (*hub.same_shape({split: formats.read_file(file) for split, file in files.items()}, str(path)), notes)


def build(
    name: str,
    shape: Shape,
    given: dict[str, list[Row]],
    settings: DataSettings,
    source: str,
    licence: str = "",
    family: str = "",
    dvc_id: str = "",
    template: str | None = None,
    metric: Metric | None = None,
    notes: Sequence[str] = (),
) -> Task:
    """Rows -> task. notes: on what was not read.

    Raises UserError for a label set, metric or template that does not fit.
    """
    kind: Kind = "classification" if shape == "text+label" else "generation"
    labels = check_labels(given, source) if kind == "classification" else ()
    metric = check_metric(settings.metric or metric, kind)
    template = templates.check_template(template or settings.template or templates.default_template(kind, labels))
    limits = Limits(settings.max_train, settings.max_validation, settings.max_test)
    splits, left_out = make_splits(given, limits, settings.seed, kind == "classification", source)
    present = {row.answer for rows in splits.values() for row in rows}
    if kind == "classification" and present != set(labels):
        left_out.append(f"labels without a row within the limits: {listed(sorted(set(labels) - present))}")
        labels = tuple(label for label in labels if label in present)
    examples = {split: tuple(templates.render(row, template, labels) for row in splits[split]) for split in SPLITS}
    return Task(
        name=name,
        version=version(examples),
        kind=kind,
        metric=metric,
        train=examples["train"],
        validation=examples["validation"],
        test=examples["test"],
        labels=labels,
        source=source,
        licence=licence,
        family=family,
        dvc_id=dvc_id,
        template=template,
        notes=(*notes, *left_out),
    )


def check_labels(given: dict[str, list[Row]], source: str, few: bool = False) -> tuple[str, ...]:
    """All labels, sorted. Raises UserError when there is one only, or so many that they are free text. few: a handful
    of rows, each of which may have a label of its own."""
    counts = Counter(row.answer for rows in given.values() for row in rows)
    if len(counts) == 1:
        raise UserError(f"{source}: every row has the label {next(iter(counts))[:40]!r}; add rows with another label")
    if len(counts) > MAX_LABELS or (not few and len(counts) > 20 and len(counts) > counts.total() / 2):
        raise UserError(
            f"{source}: {len(counts):,} different labels in {counts.total():,} rows look like free text; "
            "name the columns prompt and completion"
        )
    return tuple(sorted(counts))


def check_metric(metric: Metric | None, kind: Kind) -> Metric:
    fitting: tuple[Metric, ...] = ("accuracy", "macro_f1") if kind == "classification" else ("exact_match",)
    if metric is not None and metric not in fitting:
        raise UserError(f"the metric {metric} does not fit a {kind} task; use {' or '.join(fitting)}")
    return metric or fitting[0]


def version(examples: dict[str, tuple[Example, ...]]) -> str:
    """First 16 hex digits of the sha256 of the rows as JSON lines, split after split."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for example in examples[split]:
            digest.update(json.dumps([split, example.prompt, example.completion], ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()[:16]


def unknown(name: str) -> str:
    """For a name that is neither a path nor in the catalog: what was probably meant."""
    names = [entry.name for entry in catalog.entries()]
    files = [p.name for p in Path().iterdir() if p.suffix.lower() in formats.SUFFIXES]
    close = difflib.get_close_matches(name, [*names, *files], n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else "`metapeft tasks list` shows the catalog"
    return f"no task {name[:80]!r}: no such file, and not in the catalog; {hint}"
