"""Examples -> token ids, once per task and backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from metapeft.data.task import SPLITS, Example, Task
from metapeft.errors import UserError


@dataclass(frozen=True)
class Encoded:
    """ids: prompt then completion then end of sequence. The completion starts at `start`."""

    ids: tuple[int, ...]
    start: int

    @property
    def length(self) -> int:
        """Tokens that go into the model: all but the last, which is only predicted."""
        return len(self.ids) - 1

    def without(self, shared: int) -> Encoded:
        """The same example after its first `shared` prompt tokens."""
        return Encoded(self.ids[shared:], self.start - shared)

    def behind(self, shared: Sequence[int]) -> Encoded:
        """The same example with these prompt tokens before it."""
        return Encoded((*shared, *self.ids), len(shared) + self.start)


def plain_ids(text: str, tokenizer: Any) -> list[int]:
    """As the backbone met text in its training: where its tokenizer begins with a token of its own (Llama's, Gemma's
    and Mistral's do), so does this, as mlx-lm's and Hugging Face's generation do; an end is not added."""
    own = tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
    ids = list(tokenizer.encode(text, add_special_tokens=own))
    ends = own and ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token)
    return ids[:-1] if ends else ids


def prompt_ids(prompt: str | tuple[tuple[str, str], ...], tokenizer: Any) -> list[int]:
    """A plain prompt as it is; chat messages through the backbone's chat template."""
    if isinstance(prompt, str):
        return plain_ids(prompt, tokenizer)
    import jinja2

    messages = [{"role": role, "content": content} for role, content in prompt]
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    except (ValueError, jinja2.TemplateError) as error:  # a template may refuse a role, such as "system"
        raise UserError(f"the backbone's chat template does not take these chat messages: {error}") from error


def encode(example: Example, tokenizer: Any) -> Encoded:
    """Prompt and completion are tokenised apart, so that scoring sees the same prompt whatever the completion is."""
    prompt = prompt_ids(example.prompt, tokenizer)
    completion = tokenizer.encode(example.completion, add_special_tokens=False)
    if not prompt:  # a completion needs something to be predicted from
        prompt = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    return Encoded((*prompt, *completion, tokenizer.eos_token_id), len(prompt))


def encode_task(task: Task, tokenizer: Any, context_length: int) -> dict[str, list[Encoded]]:
    """All splits. Raises UserError naming the first row that does not fit into the backbone's context."""
    result: dict[str, list[Encoded]] = {}
    for name in SPLITS:
        result[name] = [encode(example, tokenizer) for example in task.split(name)]
        long = [i for i, e in enumerate(result[name]) if len(e.ids) > context_length]
        if long:
            tokens = len(result[name][long[0]].ids)
            raise UserError(
                f"task {task.name}: {len(long)} rows are longer than the backbone's context of {context_length} tokens "
                f"(first: {name} row {long[0] + 1}, {tokens} tokens, {preview(task.split(name)[long[0]])!r}); "
                "shorten them"
            )
    return result


def preview(example: Example, characters: int = 40) -> str:
    text = example.prompt if isinstance(example.prompt, str) else example.prompt[-1][1]
    return text if len(text) <= characters else text[: characters - 1] + "…"


def text_ids(shared: Sequence[int], encoded: Sequence[Encoded], tokens: int) -> list[int]:
    """The shared beginning and the first training examples: the text that text initialisations start from."""
    result = list(shared)
    for item in encoded:
        if len(result) >= tokens:
            break
        result += item.ids
    return result[:tokens]


def shared_beginning(encoded: Sequence[Encoded]) -> tuple[int, ...]:
    """The tokens that all prompts begin with; each keeps at least one token of its own."""
    first = encoded[0].ids
    length = min(e.start for e in encoded) - 1
    for example in encoded:
        length = next((i for i in range(length) if example.ids[i] != first[i]), length)
    return first[:length]
