"""Splits: the same for the same rows, disjoint, stratified, and of sensible sizes."""

import random
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from metapeft.data.rows import Row
from metapeft.data.splits import MIN_PROMPTS, Limits, make_splits, normalised
from metapeft.data.task import SPLITS
from metapeft.errors import UserError

LARGE = Limits(train=10_000, validation=10_000, test=10_000)
# Few letters, so that prompts coincide up to case and white space often.
PROMPTS = st.text(st.sampled_from("aAbBß  \t1"), min_size=1, max_size=5).filter(str.strip)
ROWS = st.lists(st.builds(Row, PROMPTS, st.sampled_from(["x", "y", "z"])), min_size=30, max_size=120)


def labelled(count: int, labels: int = 2) -> list[Row]:
    return [Row(f"text number {i}", f"label {i % labels}") for i in range(count)]


def split(rows: list[Row], limits: Limits = LARGE, seed: int = 0, stratified: bool = True) -> dict[str, list[Row]]:
    return make_splits({"train": rows}, limits, seed, stratified, "rows")[0]


def prompts(rows: list[Row]) -> set[str]:
    return {normalised(row.prompt) for row in rows}


@settings(deadline=None)
@given(ROWS, st.booleans(), st.integers(0, 3), st.randoms(use_true_random=False))
def test_order_does_not_matter_and_no_prompt_crosses(
    rows: list[Row], stratified: bool, seed: int, shuffler: random.Random
) -> None:
    assume(len(prompts(rows)) >= MIN_PROMPTS)
    first = split(rows, seed=seed, stratified=stratified)
    shuffled = list(rows)
    shuffler.shuffle(shuffled)
    assert split(shuffled, seed=seed, stratified=stratified) == first
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert not prompts(first[one]) & prompts(first[other])
    assert set().union(*(prompts(first[name]) for name in SPLITS)) == prompts(rows)
    assert all(first[name] for name in SPLITS)


@settings(deadline=None)
@given(ROWS, ROWS, ROWS)
def test_given_splits_are_kept_but_for_leaks(train: list[Row], validation: list[Row], test: list[Row]) -> None:
    assume(len(prompts(train) - prompts(validation) - prompts(test)) >= MIN_PROMPTS)
    assume(prompts(validation) - prompts(test))
    given_splits = {"train": train, "validation": validation, "test": test}
    found, _ = make_splits(given_splits, LARGE, 0, True, "rows")
    assert prompts(found["test"]) == prompts(test)
    assert prompts(found["validation"]) == prompts(validation) - prompts(test)
    assert prompts(found["train"]) == prompts(train) - prompts(validation) - prompts(test)


@pytest.mark.parametrize("count", [10, 16, 20, 50, 200, 5000])
def test_every_size_gives_three_useful_splits(count: int) -> None:
    found = split(labelled(count), Limits(1000, 150, 300))
    assert len(found["test"]) == min(300, int(0.3 * count))
    assert len(found["validation"]) == max(1, min(150, int(0.15 * count)))
    assert len(found["train"]) >= min(1000, count // 2)
    for rows in (found["train"], found["test"]):
        assert len(set(Counter(row.answer for row in rows).values())) <= 2  # balanced to one row
        assert abs(Counter(row.answer for row in rows)["label 0"] - len(rows) / 2) <= 1


def test_labels_keep_their_share() -> None:
    rows = [Row(f"t {i}", "rare" if i % 10 == 0 else "common") for i in range(2000)]
    for name, found in split(rows, Limits(500, 100, 200)).items():
        share = Counter(row.answer for row in found)["rare"] / len(found)
        assert share == pytest.approx(0.1, abs=0.011), name


def test_a_label_with_one_row_is_trained_on() -> None:
    rows = [*labelled(200, labels=5), Row("the only one", "single")]
    found = split(rows, Limits(50, 20, 20))
    assert "single" in {row.answer for row in found["train"]}


def test_training_splits_are_nested_and_the_test_split_stays() -> None:
    rows = labelled(1000, labels=7)
    large, small = split(rows, Limits(400, 50, 100)), split(rows, Limits(40, 50, 100))
    assert large["train"][:40] == small["train"]
    assert len({row.answer for row in small["train"]}) == 7
    assert large["test"] == small["test"] and large["validation"] == small["validation"]


def test_the_seed_changes_the_splits() -> None:
    rows = labelled(200)
    assert split(rows, seed=1)["test"] != split(rows, seed=2)["test"]


def test_duplicates_count_once_and_are_noted() -> None:
    rows = labelled(50)
    again = [Row(f"  TEXT   number {i}", row.answer) for i, row in enumerate(rows[:5])]
    found, notes = make_splits({"train": rows + again}, LARGE, 0, True, "rows")
    assert sum(map(len, found.values())) == 50
    assert notes == ["5 duplicate rows left out"]


def test_contradictory_rows_stay_together() -> None:
    rows = [*labelled(60), *(Row(f"text number {i}", "another") for i in range(20))]
    found = split(rows)
    for one in SPLITS:
        for i in range(20):
            answers = [row for row in found[one] if row.prompt == f"text number {i}"]
            assert len(answers) in (0, 2)


def test_messages_are_the_same_up_to_case_and_white_space_too() -> None:
    asked = [f"Question {i}?" for i in range(40)]
    spelled = [q + end for q in asked for end in ("", " ", "\n")] + [q.upper() for q in asked]
    rows = [Row((("system", "Be  brief."), ("user", text)), "yes") for text in spelled]
    found = split(rows, stratified=False)
    assert sum(len(found[name]) for name in SPLITS) == 40, "each question once"
    two = [Row((("user", "a"), ("assistant", "b c")), "x"), Row((("user", "a b"), ("assistant", "c")), "x")]
    assert len(prompts(two)) == 2, "a word of one message is no word of the next"


def test_what_is_measured_on_is_like_the_whole_split() -> None:
    """Two hundred labels with one row each are 6 % of this test split, and were two thirds of its 300 rows once."""
    test = [Row(f"usual {i}", "usual") for i in range(3000)] + [Row(f"rare {i}", f"rare {i}") for i in range(200)]
    given = {"train": labelled(500, 5), "test": test}
    found, _ = make_splits(given, Limits(400, 100, 300), 0, True, "rows")
    assert len(found["test"]) == 300
    assert sum(row.answer == "usual" for row in found["test"]) / 300 == pytest.approx(0.9375, abs=0.04)
    few = {"train": labelled(500, 5), "test": [Row(f"other {i}", f"label {i % 5}") for i in range(1000)]}
    found, _ = make_splits(few, Limits(400, 100, 300), 0, True, "rows")
    assert set(Counter(row.answer for row in found["test"]).values()) == {60}


def test_leaks_between_given_splits_are_noted() -> None:
    rows = labelled(60)
    found, notes = make_splits({"train": rows, "test": rows[:10]}, LARGE, 0, True, "rows")
    assert len(found["test"]) == 10 and len(found["train"]) + len(found["validation"]) == 50
    assert notes == ["train: 10 prompts left out that other splits hold too"]


def test_what_the_limits_leave_out_is_noted() -> None:
    given = {"train": labelled(2000), "test": [Row(f"other {i}", str(i % 2)) for i in range(40)]}
    notes = make_splits(given, Limits(1500, 150, 30), 0, True, "rows")[1]
    assert notes == ["using 1,500 of 1,850 training rows (data.max_train)", "using 30 of 40 test rows (data.max_test)"]


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(UserError, match=r"mine\.csv has only 9 distinct prompts.*at least 10"):
        make_splits({"train": labelled(9) * 5}, LARGE, 0, True, "mine.csv")
    with pytest.raises(UserError, match=r"0 distinct prompts to train on .train: 60 prompts left out that other"):
        make_splits({"train": labelled(60), "test": labelled(60)}, LARGE, 0, True, "mine.csv")
