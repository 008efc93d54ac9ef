"""How a row becomes what the backbone reads: a prompt from the template, a completion with its leading space."""

from __future__ import annotations

import re
from collections.abc import Sequence

from metapeft.data.rows import Row
from metapeft.data.task import Example, Kind, separator
from metapeft.errors import UserError

MAX_LISTED_LABELS = 10  # longer lists cost more tokens than they explain
FIELDS = ("text", "labels")


def default_template(kind: Kind, labels: Sequence[str]) -> str:
    """Classification names its labels in the prompt where they are few; generation takes the prompt as it is.

    The labels come first: what all prompts begin with is computed once per step (see `training.session`).
    """
    if kind == "generation":
        return "{text}"
    return "Label: {labels}\n{text}\nLabel:" if len(labels) <= MAX_LISTED_LABELS else "{text}\nLabel:"


def check_template(template: str) -> str:
    """The template itself. Raises UserError when it has no {text} or another field than {text} and {labels}."""
    fields = re.findall(r"\{(\w*)\}", template)
    unknown = [field for field in fields if field not in FIELDS]
    if "text" not in fields or unknown:
        what = f"has the unknown field {{{unknown[0]}}}" if unknown else "has no {text}"
        raise UserError(f"the prompt template {template[:60]!r} {what}; use {{text}} and, if wanted, {{labels}}")
    return template


def render(row: Row, template: str, labels: Sequence[str]) -> Example:
    """One example; chat messages are left to the backbone's own chat template."""
    if not isinstance(row.prompt, str):
        return Example(row.prompt, row.answer)
    values = {"text": row.prompt, "labels": enumerate_labels(labels)}
    # Not str.format: braces in the template that are no field stay as they are, and so do those of the row.
    prompt = re.sub(r"\{(text|labels)\}", lambda match: values[match[1]], template)
    if labels and re.search(r"\{(text|labels)\}\Z", template):
        prompt = prompt.rstrip()  # or a label's completion would depend on how the text before it ends
    return Example(prompt, separator(prompt) + row.answer)


def text(example: Example, template: str, labels: Sequence[str]) -> str:
    """What the row itself says, without what the template put around it; of chat messages the last."""
    if not isinstance(example.prompt, str):
        return example.prompt[-1][1]
    before, _, after = template.replace("{labels}", enumerate_labels(labels)).partition("{text}")
    around = example.prompt.startswith(before) and example.prompt.endswith(after) and "{text}" not in after
    return example.prompt[len(before) : len(example.prompt) - len(after)] if around else example.prompt


def enumerate_labels(labels: Sequence[str]) -> str:
    """a, b or c"""
    return " or ".join(part for part in (", ".join(labels[:-1]), *labels[-1:]) if part)
