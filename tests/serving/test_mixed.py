"""Rows of different adapters in one pass compute what each adapter computes alone."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from metapeft.backbones import Backbone
from metapeft.errors import UserError
from metapeft.peft import adapters
from metapeft.peft.base import METHODS
from metapeft.runtime import mx
from metapeft.serving.engine import Engine
from metapeft.serving.generate import Batch, Row, Sampling, Text, sample, whole, write
from metapeft.serving.mixed import MOST_STACKED, Mixture, Resident, read
from metapeft.serving.score import Answers, Question, score
from tests.backbones.tiny import tiny
from tests.serving.made import save

PROMPTS = [b"the cat sat on", b"a", b"every one of them is longer than the others", b"zebra?", b"xy", b"12345678"]


def prompts() -> list[list[int]]:
    backbone = tiny("llama")
    return [list(backbone.tokenizer.encode(p.decode())) for p in PROMPTS]


def alone(architecture: str, folder: Path | None, ids: list[int], tokens: int) -> tuple[list[int], np.ndarray]:
    """Greedy tokens and the logits after the last, without a cache and without this package."""
    backbone = tiny(architecture)
    model = backbone.model
    if folder is not None:
        model = adapters.with_adapter(model, adapters.load(folder, model))
    found = list(ids)
    for _ in range(tokens):
        found.append(int(mx.argmax(model(mx.array([found]))[0, -1])))
    return found[len(ids) :], np.array(model(mx.array([found[:-1]]))[0, -1].astype(mx.float32))


def together(
    architecture: str, folders: list[Path | None], tokens: int, piece: int = 7
) -> tuple[list[list[int]], np.ndarray]:
    backbone = tiny(architecture)
    mixture = Mixture(backbone.model)
    held = {f: read(f, backbone.model, f.name) for f in folders if f is not None}
    rows = [Row(ids, held.get(f), tokens) for ids, f in zip(prompts(), folders, strict=True)]  # type: ignore[arg-type]
    batch = Batch(backbone.model, mixture, rows)
    while (logits := batch.advance(piece)) is None:
        pass
    write(rows, logits)
    for _ in range(tokens - 1):
        logits = batch.step()
        write(rows, logits)
    return [[t.id for t in row.written] for row in rows], np.array(logits.astype(mx.float32))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path | None]:
    root = tmp_path_factory.mktemp("adapters")
    return [*(save(root / method, tiny("llama"), method, seed) for seed, method in enumerate(METHODS)), None]


def test_every_method_and_none_in_one_batch(folders: list[Path | None]) -> None:
    tokens, logits = together("llama", folders, 6)
    for row, (ids, folder) in enumerate(zip(prompts(), folders, strict=True)):
        expected, last = alone("llama", folder, ids, 6)
        assert tokens[row] == expected
        np.testing.assert_allclose(logits[row], last, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("architecture", ["qwen3", "phi3", "gemma3_text", "qwen3_moe"])
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    names = ["lora", "adalora"] + (["prompt"] if architecture != "gemma3_text" else [])
    made: list[Path | None] = [save(tmp_path / m, tiny(architecture), m, n) for n, m in enumerate(names)]
    folders = [*made, None, *made][:6]
    folders += [None] * (6 - len(folders))
    tokens, _ = together(architecture, folders, 5)
    for row, (ids, folder) in enumerate(zip(prompts(), folders, strict=True)):
        assert tokens[row] == alone(architecture, folder, ids, 5)[0]


def test_an_architecture_that_cannot_be_batched_is_refused_at_the_start() -> None:
    with pytest.raises(UserError, match="gemma2 cannot be served"):
        Engine(tiny("gemma2"))


def test_rows_that_come_and_go_leave_the_others_alone(folders: list[Path | None]) -> None:
    backbone = tiny("llama")
    mixture = Mixture(backbone.model)
    held = [None if f is None else read(f, backbone.model, f.name) for f in folders]
    rows = [Row(ids, r, 8) for ids, r in zip(prompts(), held, strict=True)]
    writing = Batch(backbone.model, mixture, [])
    for begin in (0, 2, 4):  # two join, then a step, and so on; the first leaves early
        batch = Batch(backbone.model, mixture, rows[begin : begin + 2])
        logits = batch.advance(1000)
        assert logits is not None
        write(batch.rows, logits)
        writing.extend(batch)
        write(writing.rows, writing.step())
    writing.keep([1, 2, 3, 4, 5])
    for _ in range(3):
        write(writing.rows, writing.step())
    for row, ids, folder in list(zip(rows, prompts(), folders, strict=True))[1:]:
        assert [t.id for t in row.written] == alone("llama", folder, ids, len(row.written))[0]
    assert [len(row.written) for row in rows] == [4, 7, 6, 6, 5, 5]


def test_the_stack_is_bounded_and_forgets(tmp_path: Path) -> None:
    backbone = tiny("llama")
    mixture = Mixture(backbone.model)
    folder = save(tmp_path / "a", backbone, "lora")
    many = [read(folder, backbone.model, str(n)) for n in range(MOST_STACKED + 3)]
    for first, second in itertools.pairwise(many):
        with mixture.rows([first, second]):
            pass
        assert len(mixture.slots) <= MOST_STACKED
    mixture.forget(many[-1])
    assert not mixture.slots and not any(layer.stacked for layer in mixture.layers.values())


def test_answers_are_weighed_as_in_the_evaluation(folders: list[Path | None]) -> None:
    """Against the log-likelihoods of the deciding tokens, one sequence after another."""
    answers = Answers.of([(10, 11, 12), (10, 11, 13), (10, 20), (30, 11)])
    assert answers.decided == (3, 3, 2, 1)
    backbone = tiny("llama")
    mixture = Mixture(backbone.model)
    held = [None if f is None else read(f, backbone.model, f.name) for f in folders]
    questions = [Question(p, answers, r) for p, r in zip(prompts(), held, strict=True)]
    found = whole(score(Batch(backbone.model, mixture, [q.row for q in questions]), questions, piece=30))
    for ids, folder, values in zip(prompts(), folders, found, strict=True):
        model = tiny("llama").model
        if folder is not None:
            model = adapters.with_adapter(model, adapters.load(folder, model))
        for sequence, end, value in zip(answers.sequences, answers.decided, values, strict=True):
            logits = model(mx.array([[*ids, *sequence]]))[0].astype(mx.float32)
            logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            expected = sum(float(logs[len(ids) - 1 + d, sequence[d]]) for d in range(end))
            assert value == pytest.approx(expected, abs=2e-3)


def test_an_adapter_of_another_backbone_or_without_finite_numbers_is_refused(tmp_path: Path) -> None:
    backbone = tiny("llama")
    Mixture(backbone.model)
    folder = save(tmp_path / "infinite", tiny("llama"), "lora", scale=float("inf"))
    with pytest.raises(UserError, match="not finite"):
        read(folder, backbone.model, "infinite")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", tiny("llama"), "lora")
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="sha256"):
        read(folder, tiny("llama").model, "a")


def test_sampling_follows_the_odds() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    random = np.random.default_rng(0)
    drawn = np.bincount([sample(logits, Sampling(1.0), random) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(drawn, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    cut = np.bincount([sample(logits, Sampling(1.0, 0.7), random) for _ in range(2000)], minlength=4) / 2000
    np.testing.assert_allclose(cut, [0.625, 0.375, 0, 0], atol=0.04)
    assert {sample(logits, Sampling(0.01), random) for _ in range(50)} == {0}


def test_text_leaves_in_whole_characters_and_never_past_a_stop() -> None:
    backbone: Backbone = tiny("llama")
    original = "día 5 → 6 日本 END more"
    ids = backbone.tokenizer.encode(original)
    assert len(ids) > len(original)  # bytes, so characters come in pieces
    for stop, expected in (((), original), (("END",), "día 5 → 6 日本 "), (("日本 E", "zzz"), "día 5 → 6 ")):
        text = Text(lambda part: backbone.tokenizer.decode(part) if part else "", stop)
        parts = []
        for id in ids:
            over = text.add(id)
            parts.append(text.ready())
            if over:
                break
        parts.append(text.ready(final=True))
        assert "".join(parts) == expected
        assert "\ufffd" not in "".join(parts)
        assert bool(stop) == text.stopped


def test_a_held_back_beginning_of_a_stop_comes_out_at_the_end() -> None:
    text = Text(lambda ids: "".join(map(chr, ids)), ("stop!",))
    sent = ""
    for character in "we sto":
        text.add(ord(character))
        sent += text.ready()
    assert sent == "we "
    assert sent + text.ready(final=True) == "we sto"


def test_residents_count_their_bytes(tmp_path: Path) -> None:
    resident: Resident = read(save(tmp_path / "p", tiny("llama"), "prefix"), tiny("llama").model, "p")
    assert resident.tokens == 3
    assert resident.bytes == 3 * 4 * 2 * 2 * 16 * 4  # tokens, layers, keys and values, heads, width, float32
