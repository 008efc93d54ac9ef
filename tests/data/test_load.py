"""From a name to a task."""

import json
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from metapeft.data import load_task, shots, versions
from metapeft.data.splits import normalised
from metapeft.data.task import SPLITS, Task
from metapeft.errors import UserError
from metapeft.settings import DataSettings

SAMPLES = Path(__file__).parent / "samples"


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (SAMPLES / name).read_text().splitlines()]


def save(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_classification() -> None:
    task = load_task(SAMPLES / "tickets.jsonl")
    assert (task.name, task.kind, task.metric) == ("tickets", "classification", "accuracy")
    assert task.labels == ("account", "billing", "delivery")
    assert task.label_completions == (" account", " billing", " delivery")
    assert [len(task.split(name)) for name in SPLITS] == [50, 13, 27]
    assert all(e.prompt.startswith("Label: account, billing or delivery\n") for e in task.train)  # type: ignore[union-attr]
    assert {e.completion for e in task.test} == set(task.label_completions)
    assert task.dvc_id == versions.content_id(SAMPLES / "tickets.jsonl")
    assert str(SAMPLES / "tickets.jsonl") == task.source


def test_a_label_has_one_completion_however_texts_end(tmp_path: Path) -> None:
    texts = [f"message number {n}" + ("\n" if n % 4 == 0 else "") for n in range(60)]
    records = [{"text": text, "label": ("ham", "spam")[n % 3 == 0]} for n, text in enumerate(texts)]
    task = load_task(save(tmp_path / "x.jsonl", records), DataSettings(template="Is this {labels}? {text}"))
    assert (
        {e.completion for name in SPLITS for e in task.split(name)} == set(task.label_completions) == {" ham", " spam"}
    )


def test_generation() -> None:
    task = load_task(SAMPLES / "sums.jsonl")
    assert (task.kind, task.metric, task.labels) == ("generation", "exact_match", ())
    assert all(str(e.prompt).endswith(" is") and e.completion[0] == " " for e in task.train)


def test_conversations() -> None:
    task = load_task(str(SAMPLES / "parity_chat.jsonl"))
    assert task.kind == "generation"
    assert all(e.prompt[0] == ("system", "Answer with one word.") for e in task.train)
    assert {e.completion for e in task.train} == {"even", "odd"}


def test_the_version_depends_on_the_rows_only(tmp_path: Path) -> None:
    first = load_task(SAMPLES / "tickets.jsonl")
    records = rows("tickets.jsonl")
    random.Random(1).shuffle(records)
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "other.parquet")
    second = load_task(tmp_path / "other.parquet")
    assert second.version == first.version and second.train == first.train
    records[0]["text"] += "!"
    assert load_task(save(tmp_path / "changed.jsonl", records)).version != first.version
    assert load_task(SAMPLES / "tickets.jsonl", DataSettings(seed=1)).version != first.version


def test_settings_are_respected() -> None:
    settings = DataSettings(max_train=12, max_validation=6, max_test=9, metric="macro_f1", template="{text} =>")
    task = load_task(SAMPLES / "tickets.jsonl", settings)
    assert [len(task.split(name)) for name in SPLITS] == [12, 6, 9]
    assert task.metric == "macro_f1" and str(task.train[0].prompt).endswith(" =>")
    # 90 rows, of which test and validation are taken first
    assert task.notes == ("using 12 of 75 training rows (data.max_train)",)
    assert load_task(SAMPLES / "tickets.jsonl").notes == ()


def test_a_template_that_ends_in_a_space() -> None:
    task = load_task(SAMPLES / "tickets.jsonl", DataSettings(template="{text}\nLabel: "))
    assert task.label_completions == ("account", "billing", "delivery")
    assert {e.completion for e in task.train} == set(task.label_completions)


def test_numeric_labels(tmp_path: Path) -> None:
    path = tmp_path / "numbers.csv"
    path.write_text("text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(30)))
    assert load_task(path).labels == ("0", "1")


def test_a_folder_of_splits(tmp_path: Path) -> None:
    records = rows("tickets.jsonl")
    save(tmp_path / "train.jsonl", records[:60])
    save(tmp_path / "valid.jsonl", records[50:70])  # mlx-lm's name; ten rows leak into training
    save(tmp_path / "test.jsonl", records[70:])
    task = load_task(tmp_path)
    assert [len(task.split(name)) for name in SPLITS] == [50, 20, 20]
    assert {normalised(e.prompt.split("\n")[1]) for e in task.test} == {normalised(r["text"]) for r in records[70:]}
    assert "train: 10 prompts left out that other splits hold too" in task.notes
    assert task.dvc_id.endswith(".dir")


@pytest.mark.parametrize("other", ["test.json", "eval.jsonl", "test_set.csv"])
def test_a_file_that_is_not_used_is_named(tmp_path: Path, other: str) -> None:
    save(tmp_path / "train.jsonl", rows("tickets.jsonl"))
    (tmp_path / "README.md").write_text("About it.")
    (tmp_path / other).write_text("whatever")
    (note,) = load_task(tmp_path).notes
    assert note.startswith(f"not used: {other!r} (only files called train, validation or test are")


def test_a_folder_that_metapeft_works_in_has_no_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "train.jsonl", rows("tickets.jsonl"))
    assert load_task(tmp_path).dvc_id
    monkeypatch.setenv("METAPEFT_HOME", str(tmp_path / ".metapeft"))
    assert not load_task(tmp_path).dvc_id


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ({}, "without a train file"),
        ({"train.jsonl": "tickets", "train.csv": "tickets"}, "two files for train"),
        ({"train.jsonl": "tickets", "test.jsonl": "sums"}, r"test is prompt\+completion while train is text\+label"),
    ],
)
def test_bad_folders(tmp_path: Path, files: dict[str, str], part: str) -> None:
    for name, sample in files.items():
        shutil.copy(SAMPLES / f"{sample}.jsonl", tmp_path / name)
    with pytest.raises(UserError, match=part):
        load_task(tmp_path)


@pytest.mark.parametrize(
    ("records", "settings", "part"),
    [
        ([{"text": f"t {i}", "label": "x"} for i in range(30)], {}, "every row has the label 'x'"),
        ([{"text": f"t {i}", "label": f"l {i}"} for i in range(30)], {}, "look like free text"),
        ([{"text": f"t {i % 4}", "label": f"l {i % 2}"} for i in range(30)], {}, "only 4 distinct prompts"),
        ([{"text": f"t {i}", "label": f"l {i % 2}"} for i in range(30)], {"metric": "exact_match"}, "does not fit"),
        ([{"prompt": f"t {i}", "completion": "x"} for i in range(30)], {"metric": "accuracy"}, "use exact_match"),
        ([{"text": f"t {i}", "label": f"l {i % 2}"} for i in range(30)], {"template": "hello"}, "no {text}"),
    ],
)
def test_unusable_rows(tmp_path: Path, records: list[dict[str, str]], settings: dict[str, str], part: str) -> None:
    with pytest.raises(UserError) as caught:
        load_task(save(tmp_path / "rows.jsonl", records), DataSettings.model_validate(settings))
    assert part in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("sms_spm", "did you mean sms_spam"),
        ("tickts.jsonl", "no such file: tickts.jsonl"),
        ("data.xlsx", "no such file: data.xlsx"),
        ("nothing like it", "metapeft tasks list"),
        ("", "no task is given"),
    ],
)
def test_unknown_names(name: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_task(name)
    assert part in str(caught.value)


def test_a_file_of_the_working_folder_is_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(SAMPLES / "tickets.jsonl", tmp_path)
    with pytest.raises(UserError, match=r"did you mean tickets\.jsonl"):
        load_task("tickets.json1")


def test_label_sets_are_those_of_the_splits(tmp_path: Path) -> None:
    """A label that no split holds, because of the limits, is not a label of the task; it is noted."""
    records = [{"text": f"t {i}", "label": f"l {i % 20:02}"} for i in range(400)]
    task = load_task(save(tmp_path / "r.jsonl", records), DataSettings(max_train=5, max_validation=1, max_test=1))
    found = {e.completion.strip() for name in SPLITS for e in task.split(name)}
    assert set(task.labels) == found and any("labels without a row" in note for note in task.notes)
    assert isinstance(task, Task)


def test_a_file_that_is_called_like_a_task_of_the_catalog_is_another_task(tmp_path: Path) -> None:
    path = Path(shutil.copy(SAMPLES / "tickets.jsonl", tmp_path / "sms_spam.jsonl"))
    assert load_task(path).name == shots.read(path, DataSettings()).name == "my-sms_spam"
    assert load_task(path.rename(tmp_path / "sms-spam.jsonl")).name == "sms-spam"
