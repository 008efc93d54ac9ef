"""What is counted without a model: checked against counts made by hand."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metapeft.data.task import Example, Task
from metapeft.profiling import text
from metapeft.training.encode import Encoded
from tests.profiling.tasks import chat, classification


def task(rows: list[tuple[str, str]], labels: tuple[str, ...] = ("a", "b")) -> Task:
    examples = tuple(Example(prompt, completion) for prompt, completion in rows)
    return Task("t", "v", "classification" if labels else "generation", "accuracy", examples, (), (), labels)


def test_labels_and_duplicates() -> None:
    rows = [("Hi there", " a"), ("Hi there", " a"), ("hi, THERE!", " b"), ("other", " a"), ("more", " b"), ("x", " b")]
    found = text.complexity(task(rows))
    assert found["labels"] == 2 and found["label_entropy"] == 1.0 and found["majority_share"] == 0.5
    assert found["duplicates"] == pytest.approx(1 / 6)  # one row is an exact copy
    assert found["near_duplicates"] == pytest.approx(2 / 6)  # two rows say what the first says
    assert found["disagreeing_duplicates"] == pytest.approx(1 / 6)  # and one of them differs in its label
    skewed = text.complexity(task([("p", " a")] * 3 + [("q", " b")]))
    assert skewed["label_entropy"] == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)))
    free = text.complexity(task([("p", " one"), ("q", " two")], labels=()))
    assert free["classification"] == 0 and free["label_entropy"] == 0 and free["distinct_completions"] == 1


def test_sizes_are_those_of_the_tokens() -> None:
    encoded = [Encoded(tuple(range(10)), 8), Encoded((1, 1, 1, 1), 2)]
    found = text.size(task([("p", " a"), ("q", " b")]), encoded)
    assert found["prompt_tokens_mean"] == 5 and found["prompt_tokens_max"] == 8
    assert found["completion_tokens_mean"] == 2 and found["train_tokens"] == 14
    assert found["vocabulary"] == 10 and found["type_token_ratio"] == pytest.approx(10 / 14)
    assert found["train_examples"] == 2 and found["test_examples"] == 0 and found["shared_tokens"] == 0


def test_the_template_is_not_the_text() -> None:
    bodies = text.bodies(classification().train)
    assert not any("spam?" in body or "Message" in body or "Label" in body for body in bodies)
    assert all(body.strip() for body in bodies)
    assert all("Be brief" not in body for body in text.bodies(chat().train))
    same = [Example("one and the same", " a")] * 3
    assert text.bodies(same) == ["one and the same"] * 3


@given(st.lists(st.text("ab \n", max_size=8), min_size=2, max_size=5), st.text("xy z\n"), st.text("xy z\n"))
def test_what_differs_between_prompts_is_kept(bodies: list[str], before: str, after: str) -> None:
    found = text.bodies([Example(f"{before}{body}{after}", " a") for body in bodies])
    assert len(set(found)) == len(set(bodies))
    for body, kept in zip(bodies, found, strict=True):
        assert kept in f"{before}{body}{after}"


def test_characters_and_languages() -> None:
    english = text.domain(["The cat sat on the mat, and it was 3 o'clock."], 12)
    assert english["script_latin"] == 1 and english["words_english"] > 0.3 and english["words_european"] == 0
    assert english["digits"] == pytest.approx(1 / 45) and english["upper"] == pytest.approx(1 / 45)
    assert english["letters"] + english["digits"] + english["spaces"] + english["punctuation"] == pytest.approx(1)
    assert text.domain(["Der Hund und die Katze"], 5)["words_european"] > 0.5
    assert text.domain(["привет мир"], 5)["script_greek_cyrillic"] == 1
    assert text.domain(["今天天气很好"], 5)["script_cjk"] == 1
    assert text.domain([""], 0)["tokens_per_character"] == 0


def test_the_sample_is_fixed_and_bounded() -> None:
    rows = classification(100).train
    assert text.sample(rows, 10) == text.sample(rows, 10)
    assert len(set(text.sample(rows, 10))) == 10
    assert sorted(text.sample(rows, 1000)) == list(range(len(rows)))


def test_ten_thousand_rows_take_under_two_seconds() -> None:
    big = classification(20_000)
    assert len(big.train) == 10_000
    encoded = [Encoded(tuple(range(30)), 28)] * text.SAMPLE
    begin = time.process_time()
    rows = [big.train[i] for i in text.sample(big.train, text.SAMPLE)]
    text.size(big, encoded)
    text.complexity(big)
    text.domain(text.bodies(rows), 1000)
    assert time.process_time() - begin < 2
    long = replace(big, train=tuple(Example("word " * 20_000, " ham") for _ in range(50)))
    begin = time.process_time()
    text.domain(text.bodies(long.train), 1000)
    assert time.process_time() - begin < 2
