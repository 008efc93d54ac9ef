"""Every parser of what a user gives, fuzzed: a valid result or one clear sentence, never anything else.

METAPEFT_FUZZ is the number of cases per test (25 in `make test`, 2,000 in `make test-faults`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from metapeft.data.load import load_task
from metapeft.data.templates import check_template
from metapeft.peft import adapters, checkpoints
from metapeft.search import spaces
from metapeft.settings import Settings, load_settings
from metapeft.stages.stage import assignments, nested
from metapeft.training.configuration import full
from tests.backbones import tiny
from tests.faults.sound import EXAMPLES, refused, sound, tried
from tests.serving import made

pytestmark = pytest.mark.timeout(3000)
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # shrinking a case takes longer than reading it
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
WORDS = (
    ["nan", "inf", "-inf", "1e999", "0x1f", "1_000", "~", "null", "yes", "2024-13-45", "12:30:99", "\x00", "\ud800"],
    ["[" * 3000, "9" * 5000, "é" * 300, "../..", "${HOME}", "{{7*7}}", "\u2028", "a" * 5000],
)
ODD = st.sampled_from([word for some in WORDS for word in some])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 40)
    | st.floats()
    | st.text(max_size=12)
    | ODD
    | st.sampled_from([10**400, -(10**20), 2**63, 1e308, 5e-324])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = [
    *Settings.model_fields,
    *(
        f"{s}.{n}"
        for s in ("data", "sweep", "train", "recommend", "tracking")
        for n in (Settings.model_fields[s].annotation.model_fields)
    ),
]  # type: ignore[union-attr]
METHODS = ("lora", "adalora", "prompt", "prefix", "p_tuning")
KNOBS = sorted({name for method in METHODS for name in full({"method": method})} | {"steps"})


@pytest.fixture(scope="module", autouse=True)
def summary() -> Iterator[None]:
    yield
    from tests.faults.conftest import FIGURES

    FIGURES.extend(f"fuzz: {name}: {n} cases, {refused[name]} refused in one sentence" for name, n in tried.items())


def spelled(value: Any) -> str:
    """YAML of a value, or something like it."""
    try:
        return str(yaml.safe_dump(value, allow_unicode=True))
    except (yaml.YAMLError, UnicodeError, ValueError):
        return repr(value)


# Settings


@fuzzed
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=9), VALUES, max_size=4), st.binary(max_size=40))
def test_a_params_file_of_known_names_and_wild_values(tmp_path: Path, values: dict[str, Any], tail: bytes) -> None:
    tree: dict[str, Any] = {}
    for name, value in values.items():
        section, _, key = name.partition(".")
        if key and isinstance(tree.setdefault(section, {}), dict):
            tree[section][key] = value
        elif not key:
            tree[name] = value
    file = tmp_path / "params.yaml"
    for text in (spelled(tree), spelled(tree) + tail.decode("latin-1")):
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        found = sound("params.yaml", lambda: load_settings(file))
        assert found is None or isinstance(found, Settings)


@fuzzed
@given(st.binary(max_size=200) | st.text(st.sampled_from("ab:-[]{}&*!|>'\"%@#?,\n \t<=0x1.~"), max_size=60))
def test_a_params_file_of_any_text(tmp_path: Path, content: bytes | str) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    sound("params.yaml", lambda: load_settings(file))
    sound("space file", lambda: spaces.space(narrow=spaces.read(file)))


@pytest.mark.parametrize(
    "text",
    [
        "seed: 2024-13-45",  # a date that is none: ValueError inside the YAML library
        "seed: " + "9" * 5000,
        "a: " + "[" * 5000,
        "a: &a [x]\n"
        + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)),
        "? [1, 2]\n: 3",
        "1: 2",
        "!!python/object/apply:os.system ['true']",
        "sweep: {space: {rank: 2024-01-01}}",
        "train: {configuration: {1: 2}}",
    ],
)
def test_a_params_file_with_a_known_trap(tmp_path: Path, text: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(text)
    sound("params.yaml", lambda: load_settings(file))
    sound("space file", lambda: spaces.space(narrow=spaces.read(file)))


@fuzzed
@given(st.lists(st.tuples(st.sampled_from(NAMES) | st.text(max_size=12), VALUES | ODD), max_size=4))
def test_set_options(pairs: list[tuple[str, Any]]) -> None:
    def words() -> list[str]:
        return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in pairs]

    sound("--set", lambda: load_settings(None, **nested(assignments(words()))))


@fuzzed
@given(
    st.sampled_from(METHODS) | st.sampled_from(METHODS) | SCALARS,
    st.dictionaries(
        st.sampled_from(KNOBS) | st.text(max_size=9), VALUES | st.integers(1, 64) | st.floats(0, 1), max_size=2
    ),
)
def test_configurations(method: Any, values: dict[str, Any]) -> None:
    found = sound("configuration", lambda: full({**values, "method": method}))
    if found is not None:
        json.dumps(found, allow_nan=False)  # what is recorded of it must be JSON


@fuzzed
@given(
    st.dictionaries(
        st.sampled_from([*KNOBS, "method", *(f"{m}.{k}" for m in METHODS for k in KNOBS)]) | st.text(max_size=9),
        VALUES | st.fixed_dictionaries({"low": SCALARS, "high": SCALARS}, optional={"log": SCALARS}),
        max_size=4,
    )
)
def test_spaces(narrow: dict[str, Any]) -> None:
    found = sound("space", lambda: spaces.space(narrow=narrow))
    if found is not None:
        json.dumps(found.to_json(), allow_nan=False)
        for method in found.methods:
            inside = spaces.project(spaces.defaults(method), found)
            assert inside is not None
            spaces.encode(inside, found)


@fuzzed
@given(st.text(max_size=60) | ODD)
def test_names_of_tasks_backbones_and_templates(text: str) -> None:
    from metapeft import api

    sound("prompt template", lambda: check_template(text))
    if "/" not in text or text.startswith(("/", "~", ".")):  # not what could be asked of a hub
        sound("task name", lambda: load_task(text))
        sound("backbone name", lambda: api.settings_for(text, backbone=text))
        sound("task name", lambda: api.work_folder(load_settings(None, task=text)))


@pytest.mark.parametrize(
    "text", ["~nobody-of-this-name", "a" * 5000, "x\0y", "/" + "a/" * 3000, "\ud800", "~/" + "b" * 300]
)
def test_names_that_no_file_can_have(text: str) -> None:
    from metapeft import api
    from metapeft.stages import version

    for name in (text, text + ".jsonl"):
        sound("task name", lambda name=name: load_task(name))
        sound("task name", lambda name=name: version.source(load_settings(None, task=name), Path("work")))
        sound("backbone name", lambda name=name: api.settings_for("x.jsonl", backbone=name))
        sound("task name", lambda name=name: api.work_folder(load_settings(None, task=name)))


# Task files


COLUMNS = st.sampled_from(["text", "label", "prompt", "completion", "messages", "role", "content", "é", ""])
CHAT = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | SCALARS, "content": VALUES}
    ),
    max_size=4,
)
USUAL = st.integers(12, 24).map(lambda n: [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(n)])
ODD_ROWS = st.lists(
    st.dictionaries(COLUMNS, VALUES | CHAT, max_size=4)
    | st.fixed_dictionaries({"text": VALUES, "label": SCALARS})
    | st.fixed_dictionaries({"messages": CHAT}),
    max_size=2,
)
ROWS = st.tuples(USUAL, ODD_ROWS, st.booleans()).map(
    lambda parts: parts[1] + parts[0] if parts[2] else parts[0] + parts[1]
)


@fuzzed
@given(ROWS, st.binary(max_size=12), st.floats(0, 1))
def test_jsonl_task_files(tmp_path: Path, rows: list[dict[str, Any]], noise: bytes, where: float) -> None:
    file = tmp_path / "task.jsonl"
    whole = "".join(json.dumps(row) + "\n" for row in rows).encode()
    place = int(where * len(whole))
    for content in (whole, whole[:place] + noise + whole[place:], whole[:place]):
        file.write_bytes(content)
        sound("jsonl task", lambda: load_task(file))


@fuzzed
@given(
    st.lists(
        st.lists(st.text(max_size=9) | st.sampled_from(['"', ",", "\r", "text", "label", "\0"]), max_size=4),
        max_size=2,
    )
)
def test_csv_task_files(tmp_path: Path, rows: list[list[str]]) -> None:
    file = tmp_path / "task.csv"
    for head in ("", "text,label\n", "prompt,completion\n"):
        usual = "".join(f"row {n},{'ab'[n % 2]}\n" for n in range(20)) if head else ""
        odd = "\n".join(",".join(row) for row in rows)
        file.write_bytes((head + usual + odd).encode("utf-8", "replace"))
        sound("csv task", lambda: load_task(file))


@fuzzed
@given(
    st.sampled_from([("text", "label"), ("prompt", "completion"), ("messages",), ("label",)]),
    st.sampled_from(["string", "int64", "float64", "binary", "timestamp", "decimal", "list", "struct", "bool", "null"]),
    st.integers(0, 2**16),
    st.floats(0, 1),
    st.integers(0, 255),
)
def test_parquet_task_files(
    tmp_path: Path, names: tuple[str, ...], kind: str, seed: int, where: float, byte: int
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    types = {
        "string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "binary": pa.binary(),
        "timestamp": pa.timestamp("us"), "decimal": pa.decimal128(9, 2), "list": pa.list_(pa.string()),
        "struct": pa.struct([("role", pa.string()), ("content", pa.string())]), "bool": pa.bool_(), "null": pa.null(),
    }  # fmt: skip
    values: dict[str, Callable[[int], Any]] = {
        "string": str, "int64": int, "float64": float, "binary": lambda n: b"\xff%d" % n, "bool": bool,
        "timestamp": lambda n: n, "decimal": int, "list": lambda n: [str(n)], "null": lambda n: None,
        "struct": lambda n: {"role": "user", "content": str(n)},
    }  # fmt: skip
    columns = {name: pa.array([values[kind](n + seed) for n in range(20)], types[kind]) for name in names[:-1]}
    columns[names[-1]] = pa.array([f"l{n % 2}" for n in range(20)])
    file = tmp_path / "task.parquet"
    parquet.write_table(pa.table(columns), file)
    whole = file.read_bytes()
    sound("parquet task", lambda: load_task(file))
    place = int(where * (len(whole) - 1))
    for content in (whole[:place], whole[:place] + bytes([byte]) + whole[place + 1 :]):
        file.write_bytes(content)
        sound("parquet task", lambda: load_task(file))


# Adapter folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small adapter of each method, in our format, and of LoRA in the two others."""
    place = tmp_path_factory.mktemp("adapters")
    backbone = tiny.tiny("llama")
    found = {method: made.save(place / method, backbone, method) for method in METHODS}
    for to in ("peft", "mlx-lm"):
        checkpoints.convert(found["lora"], place / to, to)  # type: ignore[arg-type]
        found[to] = place / to
    return found


KEYS = [
    "peft_type", "task_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "init_r",
    "target_r", "total_step", "tinit", "tfinal", "num_virtual_tokens", "token_dim", "num_layers", "deltaT", "bias",
    "num_attention_heads", "lora_dropout", "num_transformer_submodules", "prompt_tuning_init", "use_rslora",
    "encoder_hidden_size", "base_model_name_or_path", "fine_tune_type", "lora_parameters", "use_dora",
    "init_lora_weights", "layers_to_transform",
]  # fmt: skip


def loaded(folder: Path, model: Any) -> None:
    """Read, and put on a model where it could be read."""
    adapter = adapters.load(folder, model)
    adapter.attach(model)
    adapter.detach(model)


@fuzzed
@given(
    kind=st.sampled_from([*METHODS, "peft", "mlx-lm"]),
    changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3),
    dropped=st.sampled_from(KEYS),
)
def test_adapter_configurations(
    folders: dict[str, Path], tmp_path: Path, kind: str, changes: dict[str, Any], dropped: str
) -> None:
    """As somebody else's PEFT or mlx-lm folder: nothing seals it."""
    source = folders[kind]
    target = tmp_path / "adapter"
    target.mkdir(exist_ok=True)
    for file in target.iterdir():
        file.unlink()
    for file in source.iterdir():
        if file.name not in ("manifest.json", "metapeft.json"):
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "adapter_config.json").read_text())
    config.update(changes)
    config.pop(dropped, None)
    (target / "adapter_config.json").write_text(json.dumps(config))
    model = tiny.tiny("llama").model
    sound("adapter_config.json", lambda: loaded(target, model))
    sound("adapter_config.json", lambda: checkpoints.convert(target, tmp_path / "out", "metapeft"))


@fuzzed
@given(
    kind=st.sampled_from(["lora", "prompt", "peft", "mlx-lm"]),
    header=st.dictionaries(
        st.text(max_size=9) | st.just("prompt_embeddings") | st.just("__metadata__"),
        VALUES
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "X", ""]) | SCALARS,
                "shape": st.lists(st.integers(-2, 9) | st.sampled_from([2**40, 2**63, 2**64]), max_size=4) | SCALARS,
                "data_offsets": st.lists(st.integers(-1, 300) | st.just(2**62), min_size=1, max_size=3) | SCALARS,
            }
        ),
        max_size=3,
    ),
    length=st.none() | st.integers(0, 2**64 - 1),
    data=st.binary(max_size=64),
)
def test_safetensors_headers(
    folders: dict[str, Path], tmp_path: Path, kind: str, header: dict[str, Any], length: int | None, data: bytes
) -> None:
    target = tmp_path / "adapter"
    target.mkdir(exist_ok=True)
    for file in target.iterdir():
        file.unlink()
    text = json.dumps(header).encode()
    for file in folders[kind].iterdir():
        if file.suffix == ".safetensors":
            content = struct.pack("<Q", len(text) if length is None else length) + text + data
            (target / file.name).write_bytes(content)
        elif file.name not in ("manifest.json", "metapeft.json"):
            (target / file.name).write_bytes(file.read_bytes())
    sound("safetensors header", lambda: checkpoints.read(target))


@pytest.mark.parametrize("key", ["(a+)+b", "(.*)*x", "(a|a)*b", ".*.*.*.*.*.*.*.*.*x", "(", "[", "(?P<a>.)(?P<a>.)"])
def test_a_pattern_in_an_adapter_cannot_stop_the_clock(folders: dict[str, Path], tmp_path: Path, key: str) -> None:
    for file in folders["peft"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["rank_pattern"] = {key.replace("a", "[a-z_.0-9]"): 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    sound("adapter_config.json", lambda: checkpoints.read(tmp_path))
