"""Text to tokens: what comes before it, and what a chat template refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from metapeft.backbones import load
from metapeft.data.task import Example, Task
from metapeft.errors import UserError
from metapeft.training.encode import encode, plain_ids, prompt_ids
from metapeft.training.evaluation import Labels
from metapeft.training.session import Session
from tests.backbones.tiny import tiny, tiny_folder

START, END = 257, 258


def changed(tmp_path: Path, **files: object) -> TokenizerWrapper:
    """A tiny backbone's tokenizer with other files."""
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    for name, text in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(text if isinstance(text, str) else json.dumps(text))
    return load(str(folder)).tokenizer


def with_a_beginning(tmp_path: Path, end: bool = False) -> TokenizerWrapper:
    """As Llama's, Gemma's and Mistral's: the tokenizer puts a token of its own first."""
    known = json.loads((tiny_folder("llama") / "tokenizer.json").read_text())
    single = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {"<|im_start|>": {"id": "<|im_start|>", "ids": [START], "tokens": ["<|im_start|>"]}}
    if end:
        single.append({"SpecialToken": {"id": "<|im_end|>", "type_id": 0}})
        tokens["<|im_end|>"] = {"id": "<|im_end|>", "ids": [END], "tokens": ["<|im_end|>"]}
    processor = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}
    return changed(tmp_path, tokenizer__json=known | {"post_processor": processor})


@pytest.mark.parametrize("end", [False, True])
def test_a_prompt_begins_as_the_tokenizer_begins_text(tmp_path: Path, end: bool) -> None:
    tokenizer, plain = with_a_beginning(tmp_path, end), tiny("llama").tokenizer
    bare = list(plain.encode("Text: a", add_special_tokens=False))
    assert plain_ids("Text: a", plain) == bare
    assert plain_ids("Text: a", tokenizer) == [START, *bare]
    assert plain_ids("<|im_start|>Text: a", tokenizer) == [START, *bare], "one that stands there already is enough"
    found = encode(Example("Text: a", " yes"), tokenizer)
    assert found.ids[0] == START and found.start == len(bare) + 1 and found.ids.count(START) == 1
    assert found.ids[found.start :] == (*plain.encode(" yes", add_special_tokens=False), END)
    assert encode(Example("", " yes"), tokenizer).ids[0] == START


def test_what_mlx_lm_generates_from_is_what_was_trained_on(tmp_path: Path) -> None:
    import mlx_lm

    tokenizer = with_a_beginning(tmp_path)
    model = tiny("llama").model
    seen: list[list[int]] = []
    given = type(model).__call__

    def noted(self: object, ids: object, *rest: object, **named: object) -> object:
        seen.append(ids.tolist()[0])  # type: ignore[attr-defined]
        return given(self, ids, *rest, **named)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(model), "__call__", noted)
        mlx_lm.generate(model, tokenizer, "Text: a", max_tokens=1)
    read = [token for part in seen for token in part]
    assert read[: len(plain_ids("Text: a", tokenizer))] == plain_ids("Text: a", tokenizer)


def test_labels_that_a_tokenizer_reads_alike_are_named(tmp_path: Path) -> None:
    words = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<|pad|>": 3, "row": 4, "yes": 5}
    known = json.loads((tiny_folder("llama") / "tokenizer.json").read_text())
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<|endoftext|>"}
    tokens = [token | {"id": words[token["content"]]} for token in known["added_tokens"]]
    file = known | {"model": model, "pre_tokenizer": {"type": "Whitespace"}, "decoder": None, "added_tokens": tokens}
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    (folder / "tokenizer.json").write_text(json.dumps(file))
    rows = tuple(Example("row", f" {label}") for label in ("yes", "😀", "😁"))
    task = Task("t", "0" * 16, "classification", "accuracy", rows, rows, rows, ("yes", "😀", "😁"))
    with pytest.raises(UserError, match="reads these labels alike: '😀', '😁'"):
        Labels(Session(load(str(folder)), task))


def test_a_role_that_a_template_refuses_is_a_mistake_of_the_task(tmp_path: Path) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"
    tokenizer = changed(tmp_path, chat_template__jinja=template)
    with pytest.raises(UserError, match="does not take these chat messages: System role not supported"):
        prompt_ids((("system", "Be brief."), ("user", "Hello")), tokenizer)
