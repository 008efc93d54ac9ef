"""Native steps compute what MLX computes, and nothing that happens beside a row changes a bit of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from metapeft.kernels.serve import BRAIN, FULL, HALF, Native, Part, _Pace, native, pack
from metapeft.peft.base import METHODS
from metapeft.serving.generate import Batch, Row, whole, write
from metapeft.serving.mixed import Mixture, Resident, read
from metapeft.serving.native import Memory, NativeBatch, Steps
from metapeft.serving.score import Answers, Question, score
from tests.backbones.tiny import tiny
from tests.serving.made import save
from tests.serving.test_mixed import alone, prompts

pytestmark = pytest.mark.skipif(native(tiny("llama").model) is None, reason="no native steps on this machine")


def packed(architecture: str = "llama", threads: int | None = None) -> Native:
    found = native(tiny(architecture).model, threads)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path | None]:
    root = tmp_path_factory.mktemp("adapters")
    return [*(save(root / method, tiny("llama"), method, seed) for seed, method in enumerate(METHODS)), None]


def residents(folders: list[Path | None]) -> list[Resident | None]:
    model = tiny("llama").model
    return [None if f is None else read(f, model, f.name) for f in folders]


def test_every_method_and_none_in_one_batch(folders: list[Path | None]) -> None:
    """Greedy tokens and logits, beside each adapter alone without a cache; the prompts are read in pieces."""
    batch = NativeBatch(Steps(packed()), [Row(ids, r, 6) for ids, r in zip(prompts(), residents(folders), strict=True)])
    rows = list(batch.rows)
    write(rows, whole(batch.read_all(7)))
    for _ in range(5):
        logits = batch.step()
        write(rows, logits)
    for row, folder, found in zip(rows, folders, logits, strict=True):
        expected, last = alone("llama", folder, row.prompt, 6)
        assert [t.id for t in row.written] == expected
        np.testing.assert_allclose(found, last, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3"])
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    """Biases, tied embeddings, norms of queries and keys."""
    backbone = tiny(architecture)
    resident = read(save(tmp_path / "a", backbone, "lora"), backbone.model, "a")
    batch = NativeBatch(Steps(packed(architecture)), [Row(prompts()[2], r, 5) for r in (resident, None)])
    rows = list(batch.rows)
    write(rows, whole(batch.read_all(11)))
    for _ in range(4):
        write(rows, batch.step())
    for row, folder in zip(rows, (tmp_path / "a", None), strict=True):
        assert [t.id for t in row.written] == alone(architecture, folder, row.prompt, 5)[0]


def test_what_is_not_known_is_left_to_mlx() -> None:
    for architecture in ("gemma3_text", "phi3", "qwen3_moe"):
        assert native(tiny(architecture).model) is None


def test_bits_do_not_depend_on_pieces_company_or_threads(folders: list[Path | None]) -> None:
    held = residents(folders)
    ids = list(range(40, 97))
    found = []
    for threads, piece, company in ((1, 57, 0), (1, 5, 3), (2, 16, 14), (3, 20, 40)):
        steps = Steps(packed(threads=threads))
        rows = [Row(ids, held[0], 3), *(Row(ids[n % 9 :], held[n % len(held)], 3) for n in range(company))]
        batch = NativeBatch(steps, rows)
        steps.memory.bound = 0
        write(rows, whole(batch.read_all(piece)))
        found.append(batch.step()[0])
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_threads_that_compute_apart_find_the_same() -> None:
    found = packed(threads=3)
    ways = []
    for apart in (False, True):
        caches = [found.cache(40) for _ in range(5)]
        parts = [Part(list(range(9 * n + 1)), cache, wanted=min(n, 2)) for n, cache in enumerate(caches[:5])]
        found.step([part for part in parts if len(part.ids) < 40], apart)
        ways.append(found.step([Part([n], cache) for n, cache in enumerate(caches)], apart))
    assert np.array_equal(*ways)


def test_the_faster_way_is_taken_and_the_other_tried_again() -> None:
    pace = _Pace()
    ways = []
    for _ in range(200):
        ways.append(pace.apart(8))
        pace.took(8, ways[-1], 1.0 if ways[-1] else 2.0)
    assert ways.count(True) > 185 and ways[-100:].count(False) >= 3
    assert not pace.apart(64), "another size is not known yet"


def test_a_beginning_that_was_read_before_is_taken_over(folders: list[Path | None]) -> None:
    """To the bit, also behind virtual tokens, also the answer of an earlier turn; never from another adapter."""
    held = residents(folders)
    base = list(range(60, 100))
    for resident, other in ((held[0], held[1]), (held[3], held[2]), (None, held[0])):
        steps = Steps(packed())
        first = NativeBatch(steps, [Row(base, resident, 4), Row(base, other, 4)])
        rows = list(first.rows)
        write(rows, whole(first.read_all(64)))
        for _ in range(3):
            write(rows, first.step())
        again = [*base, *(t.id for t in rows[0].written), 7, 8]
        fresh, known = Steps(packed()), NativeBatch(steps, [Row(again, resident, 1)])
        assert known.read == [len(base) + 3]  # the last written token was never read
        expected = whole(NativeBatch(fresh, [Row(again, resident, 1)]).read_all(64))
        assert np.array_equal(whole(known.read_all(64)), expected)


def test_memory_is_bounded_and_forgets() -> None:
    found = packed()
    memory = Memory(bound=3 * found.cache(20).memory.nbytes)
    resident = Resident("r", "lora")
    rows = [Row(list(range(n, n + 16)), resident, 4) for n in range(5)]
    for row in rows:
        memory.add(row, found.cache(row.length))
    assert memory.bytes <= memory.bound and len(memory._rows) == 3
    memory.forget(resident)
    assert memory.bytes == 0 and not memory._rows


def test_answers_are_weighed_as_with_mlx(folders: list[Path | None]) -> None:
    answers = Answers.of([(10, 11, 12), (10, 11, 13), (10, 20), (30, 11), (30, 12)])
    questions = [Question(ids, answers, r) for ids, r in zip(prompts(), residents(folders), strict=True)]
    model = tiny("llama").model
    slow = whole(score(Batch(model, Mixture(model), [q.row for q in questions]), questions, piece=30))
    fast = whole(score(NativeBatch(Steps(packed()), [q.row for q in questions]), questions, piece=30))
    np.testing.assert_allclose(np.array(fast), np.array(slow), atol=2e-3)


def test_weights_are_kept_exactly_in_the_narrowest_type() -> None:
    random = np.random.default_rng(0)
    plain = random.normal(size=(70, 24)).astype(np.float32)
    halves = plain.astype(np.float16).astype(np.float32)
    brain = (plain.view(np.uint32) & 0xFFFF0000).view(np.float32) * np.float32(2**-20)  # too small for float16
    for weight, kind, dtype in ((plain, FULL, np.float32), (halves, HALF, np.float16), (brain, BRAIN, np.uint16)):
        strips, found = pack(weight, 32)
        assert found == kind and strips.dtype == dtype and strips.shape == (3, 24, 32)
        assert np.array_equal(strips[1, 5], pack(weight[32:64], 32)[0][0, 5])


@pytest.mark.parametrize("kind", ["half", "brain"])
def test_narrow_weights_compute_the_same(kind: str) -> None:
    """With many rows and with few, which take different ways through the code."""
    from metapeft.runtime import mx, tree_map

    backbone = tiny("llama")

    def narrowed(value: mx.array) -> mx.array:
        value = value.astype(mx.float16 if kind == "half" else mx.bfloat16).astype(mx.float32)
        if kind == "brain":
            value = mx.concatenate([mx.full(value[:1].shape, 2.0**-30), value[1:]])  # too small for float16
        return value

    backbone.model.update(tree_map(narrowed, backbone.model.parameters()))
    found = native(backbone.model)  # it compares logits itself
    assert found is not None and found._layers[0].linear[0].kind == (HALF if kind == "half" else BRAIN)
    ids = list(range(30, 80))
    whole = found.step([Part(ids, found.cache(60), wanted=50)])
    single = found.cache(60)
    assert np.array_equal(whole, np.concatenate([found.step([Part([id], single)]) for id in ids]))


def test_a_cache_that_is_full_is_refused() -> None:
    found = packed()
    with pytest.raises(ValueError, match="do not fit"):
        found.step([Part(list(range(40)), found.cache(16))])
