"""Adapter folders: whole or refused, replaced without a gap, recognised by their files."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metapeft.errors import UserError
from metapeft.peft import checkpoints, folder, huggingface
from metapeft.peft.lora import LoRAConfig
from metapeft.peft.saved import Saved
from metapeft.runtime import mx
from tests.peft import reference

FILES = {"adapter_config.json", "adapter_model.safetensors", "metapeft.json", "manifest.json"}


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A folder in which this test is alone."""
    (tmp_path / "room").mkdir()
    return tmp_path / "room"


def adapter(value: float, paths: int = 1) -> Saved:
    """A LoRA whose every number is `value`, so that a mixture of two adapters shows."""
    tensors = {}
    for index in range(paths):
        start = f"base_model.model.model.layers.{index}.self_attn.q_proj"
        tensors |= {f"{start}.lora_A.weight": mx.full((2, 8), value), f"{start}.lora_B.weight": mx.full((8, 2), value)}
    metadata = {"value": value, "score": {"name": "accuracy", "value": 0.5}}
    return Saved(LoRAConfig(rank=2, alpha=3.5, dropout=0.1, targets=("q_proj",)), tensors, metadata)


def value_of(saved: Saved) -> float:
    """The one number in an adapter; fails when its parts do not belong together."""
    values = {float(v) for tensor in saved.tensors.values() for v in tensor.flatten().tolist()}
    assert values == {saved.metadata["value"]}
    return values.pop()


def test_what_was_written_is_read(room: Path) -> None:
    saved = adapter(1.5, paths=3)
    checkpoints.write(room / "deep" / "a", saved)
    back = checkpoints.read(room / "deep" / "a")
    assert (back.config, back.metadata, back.format) == (saved.config, saved.metadata, "metapeft")
    assert back.tensors.keys() == saved.tensors.keys()
    assert value_of(back) == 1.5
    assert {path.name for path in (room / "deep" / "a").iterdir()} == FILES
    assert list((room / "deep").iterdir()) == [room / "deep" / "a"]


def test_the_manifest_names_every_file_with_its_size_and_hash(room: Path) -> None:
    checkpoints.write(room / "a", adapter(1.0))
    listed = json.loads((room / "a" / "manifest.json").read_text())["files"]
    assert listed.keys() == FILES - {"manifest.json"}
    for name, entry in listed.items():
        assert entry["bytes"] == (room / "a" / name).stat().st_size
        sums = subprocess.run(["sha256sum", str(room / "a" / name)], capture_output=True, text=True, check=True)
        assert sums.stdout.split()[0] == entry["sha256"]


def test_the_same_adapter_is_the_same_bytes(room: Path) -> None:
    saved = adapter(1.0, paths=3)
    backwards = Saved(saved.config, dict(reversed(saved.tensors.items())), saved.metadata)
    checkpoints.write(room / "a", saved)
    checkpoints.write(room / "b", backwards)
    for name in FILES:
        assert (room / "a" / name).read_bytes() == (room / "b" / name).read_bytes()


# Damage


@given(name=st.sampled_from(sorted(FILES - {"manifest.json"})), where=st.floats(0, 0.999), bit=st.integers(0, 7))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_flipped_bit_is_found(name: str, where: float, bit: int, room: Path) -> None:
    place = room / "a"
    checkpoints.write(place, adapter(1.0))
    content = bytearray((place / name).read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    (place / name).write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"differs from its manifest \(sha256\)") as caught:
        checkpoints.read(place)
    assert str(place / name) in str(caught.value)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(name: str, room: Path) -> None:
    checkpoints.write(room / "a", adapter(1.0))
    (room / "a" / name).unlink()
    with pytest.raises(UserError, match="is missing") as caught:
        checkpoints.read(room / "a")
    assert str(room / "a" / name) in str(caught.value)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_truncated_file_is_named(name: str, room: Path) -> None:
    checkpoints.write(room / "a", adapter(1.0))
    path = room / "a" / name
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError) as caught:
        checkpoints.read(room / "a")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "manifest",
    [b"", b"{", b"[]", b'{"files": 3}', b'{"files": {"a": {}}}', b'{"files": {}}', b"\xff\xfe", b"[" * 100_000],
)
def test_a_manifest_that_says_nothing_is_refused(manifest: bytes, room: Path) -> None:
    checkpoints.write(room / "a", adapter(1.0))
    (room / "a" / "manifest.json").write_bytes(manifest)
    with pytest.raises(UserError, match=r"manifest\.json"):
        checkpoints.read(room / "a")


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "..", "sub/file"])
def test_a_manifest_cannot_point_outside(name: str, room: Path) -> None:
    checkpoints.write(room / "a", adapter(1.0))
    path = room / "a" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="outside its folder"):
        checkpoints.read(room / "a")


def test_files_that_others_add_do_not_matter(room: Path) -> None:
    checkpoints.write(room / "a", adapter(1.0))
    (room / "a" / "README.md").write_text("notes")
    assert value_of(checkpoints.read(room / "a")) == 1.0


def test_metadata_of_another_method_is_refused(room: Path) -> None:
    checkpoints.convert(reference.DATA / "prompt" / "adapter", room / "prompt", "metapeft")
    checkpoints.write(room / "a", adapter(1.0))
    files = {name: (room / "a" / name).read_bytes() for name in FILES - {"manifest.json"}}
    folder.publish(room / "a", files | {"metapeft.json": (room / "prompt" / "metapeft.json").read_bytes()})
    with pytest.raises(UserError, match=r"says prompt and adapter_config\.json says lora"):
        checkpoints.read(room / "a")


# Recognition


def test_formats_are_recognised_by_their_files(room: Path) -> None:
    checkpoints.write(room / "ours", adapter(1.0))
    checkpoints.to_peft(room / "peft", adapter(1.0))
    checkpoints.to_mlx_lm(room / "mlx", adapter(1.0))
    found = {name: checkpoints.detect(room / name) for name in ("ours", "peft", "mlx")}
    assert found == {"ours": "metapeft", "peft": "peft", "mlx": "mlx-lm"}
    assert {checkpoints.read(room / name).format for name in found} == set(checkpoints.FORMATS)


def test_a_pickle_is_not_opened(room: Path) -> None:
    checkpoints.to_peft(room / "a", adapter(1.0))
    (room / "a" / "adapter_model.safetensors").unlink()
    (room / "a" / "adapter_model.bin").write_bytes(b"cposix\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(UserError, match=r"adapter_model\.bin is a pickle"):
        checkpoints.read(room / "a")


def test_a_place_without_an_adapter_is_named(room: Path) -> None:
    (room / "empty").mkdir()
    (room / "file").write_text("x")
    for name, words in (("empty", "holds no adapter"), ("file", "is a file"), ("absent", "there is no adapter folder")):
        with pytest.raises(UserError, match=words) as caught:
            checkpoints.read(room / name)
        assert str(room / name) in str(caught.value)


# Conversion


@pytest.mark.parametrize("source", checkpoints.FORMATS)
@pytest.mark.parametrize("target", checkpoints.FORMATS)
def test_every_format_becomes_every_other(source: checkpoints.Format, target: checkpoints.Format, room: Path) -> None:
    original = adapter(1.25, paths=2)
    writers = {"metapeft": checkpoints.write, "peft": checkpoints.to_peft, "mlx-lm": checkpoints.to_mlx_lm}
    writers[source](room / "source", original)
    given = checkpoints.convert(room / "source", room / "target", target, backbone="some/base")
    assert given.format == source and checkpoints.detect(room / "target") == target
    back = checkpoints.read(room / "target")
    assert back.metadata["backbone"] == "some/base"
    assert (back.config.rank, back.config.alpha, back.config.dropout) == (2, 3.5, 0.1)
    assert back.tensors.keys() == original.tensors.keys()
    for name, value in original.tensors.items():
        assert mx.array_equal(back.tensors[name], value)


def test_conversion_never_replaces_what_it_reads(room: Path) -> None:
    """Other formats do not hold all that ours does: the task, the scores, the seal."""
    checkpoints.write(room / "a", adapter(1.0))
    (room / "b").symlink_to(room / "a")
    before = {path.name: path.read_bytes() for path in (room / "a").iterdir()}
    for place in (room / "a", room / "b"):
        with pytest.raises(UserError, match="is the adapter itself"):
            checkpoints.convert(room / "a", place, "mlx-lm")
    assert {path.name: path.read_bytes() for path in (room / "a").iterdir()} == before
    checkpoints.convert(room / "a", room / "c", "mlx-lm")
    checkpoints.convert(room / "a", room / "c", "peft")  # another one that was written here may be replaced
    assert checkpoints.detect(room / "c") == "peft"


def test_conversion_does_not_overwrite_what_is_no_adapter(room: Path) -> None:
    checkpoints.write(room / "a", adapter(1.0))
    (room / "home").mkdir()
    (room / "home" / "thesis.tex").write_text("years of work")
    for _ in ("a folder of texts", "one that a training has left an adapter in"):
        with pytest.raises(UserError, match=r"home exists and holds thesis\.tex, which belongs to no adapter"):
            checkpoints.convert(room / "a", room / "home", "peft")
        assert (room / "home" / "thesis.tex").read_text() == "years of work"
        (room / "home" / "adapter_config.json").write_text("{}")
    (room / "file").touch()
    with pytest.raises(UserError, match="file exists and is no folder"):
        checkpoints.convert(room / "a", room / "file", "peft")
    with pytest.raises(UserError, match="unknown adapter format 'onnx'"):
        checkpoints.convert(room / "a", room / "b", "onnx")  # type: ignore[arg-type]
    assert not (room / "b").exists()


# Replacing


def files_of(value: float) -> dict[str, str]:
    """Name -> hex content of an adapter folder, to hand to another process."""
    saved = adapter(value, paths=4)
    ours = {"format": 1, "configuration": saved.config.to_json(), "metadata": saved.metadata}
    files = huggingface.encode(saved) | {"metapeft.json": json.dumps(ours).encode()}
    return {name: content.hex() for name, content in files.items()}


@contextlib.contextmanager
def python(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that does not outlive the block: it gets SIGKILL at its end."""
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


PUBLISH = """
import json, os, shutil, sys
from pathlib import Path
from metapeft.peft import folder
sources = json.loads(Path(sys.argv[2]).read_text())
adapters = [{name: bytes.fromhex(content) for name, content in files.items()} for files in sources]
"""
FOREVER = """
print("ready", flush=True)
while True:
    for files in adapters:
        folder.publish(Path(sys.argv[1]), files)
"""
CRASHING = """
real, calls, allowed = os.rename, [], int(sys.argv[3])
def rename(*names):
    if len(calls) == allowed:
        os._exit(9)
    calls.append(names)
    real(*names)
os.rename = rename
shutil.rmtree = lambda *a, **k: os._exit(9)
folder.publish(Path(sys.argv[1]), adapters[0])
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_adapter(room: Path) -> None:
    place, sources = room / "a", room / "sources.json"
    sources.write_text(json.dumps([files_of(1.0), files_of(2.0)]))
    checkpoints.write(place, adapter(0.0, paths=4))
    rng, seen = random.Random(0), set()
    for _ in range(4):
        with python(PUBLISH + FOREVER, str(place), str(sources)) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
            until = time.monotonic() + 0.2 + 0.3 * rng.random()
            while time.monotonic() < until:  # readers never meet a gap or a mixture
                seen.add(value_of(checkpoints.read(place)))
        value_of(checkpoints.read(place))
    assert seen == {1.0, 2.0} or seen == {0.0, 1.0, 2.0}
    checkpoints.write(place, adapter(-1.0))
    assert value_of(checkpoints.read(place)) == -1.0


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_crash_before_between_and_after_the_two_renames(renames: int, room: Path) -> None:
    place, sources = room / "a", room / "sources.json"
    sources.write_text(json.dumps([files_of(2.0)]))
    checkpoints.write(place, adapter(1.0))
    with python(PUBLISH + CRASHING, str(place), str(sources), str(renames)) as writer:
        assert writer.wait() == 9
    assert value_of(checkpoints.read(place)) == (2.0 if renames == 2 else 1.0)
    assert checkpoints.detect(place) == "metapeft"
    sources.unlink()
    for path in room.iterdir():  # as if hours had passed
        os.utime(path, (0, 0))
    checkpoints.write(place, adapter(3.0))
    assert value_of(checkpoints.read(place)) == 3.0
    assert list(room.iterdir()) == [place]


def test_another_writers_unfinished_folder_is_left_alone(room: Path) -> None:
    building = room / ".a.new-0123456789ab"
    building.mkdir()
    checkpoints.write(room / "a", adapter(1.0))
    assert building.exists()


def test_two_writers_and_a_reader(room: Path) -> None:
    place = room / "a"
    checkpoints.write(place, adapter(0.0))
    errors: list[BaseException] = []
    done = threading.Event()

    def guarded(work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)

    def write(value: float) -> None:
        saved = adapter(value)
        mx.eval(saved.tensors)
        for _ in range(30):
            checkpoints.write(place, saved)

    def read() -> None:
        while not done.is_set():
            folder.stable(place, folder.sealed_files)

    writers = [threading.Thread(target=guarded, args=(lambda v=v: write(v),)) for v in (1.0, 2.0)]
    reader = threading.Thread(target=guarded, args=(read,))
    for thread in (*writers, reader):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not errors
    assert value_of(checkpoints.read(place)) in (1.0, 2.0)
    assert list(room.iterdir()) == [place]


def test_a_folder_moved_elsewhere_stays_valid(room: Path) -> None:
    checkpoints.write(room / "a", adapter(1.0))
    shutil.move(room / "a", room / "b")
    assert value_of(checkpoints.read(room / "b")) == 1.0


def test_a_file_in_the_way_is_kept(room: Path) -> None:
    (room / "a").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        checkpoints.write(room / "a", adapter(1.0))
    assert (room / "a").read_text() == "mine"


def test_a_folder_that_is_gone_at_two_looks_is_looked_for_again(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced before it was read, and once more before that was noticed."""
    checkpoints.write(room / "a", adapter(1.0))
    there, looks = room / "a", []
    real = folder.locate

    def locate(place: Path) -> Path:
        looks.append(place)
        return room / f"replaced-{len(looks)}" if len(looks) < 3 else real(place)

    monkeypatch.setattr(folder, "locate", locate)
    assert "metapeft.json" in folder.stable(there, folder.sealed_files)
