"""Which examples train at which step, and how a batch is cut into parts."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from metapeft.training.batches import batch_at, shards

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=80)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 9), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_shows_every_example_at_most_once_and_drops_less_than_a_batch(
    lengths: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    per_epoch = max(1, len(lengths) // batch_size)
    seen = list(
        itertools.chain(*(batch_at(lengths, batch_size, seed, epoch * per_epoch + i) for i in range(per_epoch)))
    )
    assert len(seen) == len(set(seen)) and set(seen) <= set(range(len(lengths)))
    assert len(lengths) - len(seen) < batch_size


def test_a_batch_depends_on_its_arguments_alone() -> None:
    lengths = list(range(1, 101))
    forwards = [batch_at(lengths, 4, 7, step) for step in range(60)]
    backwards = [batch_at(lengths, 4, 7, step) for step in reversed(range(60))]
    assert forwards == backwards[::-1]
    assert forwards != [batch_at(lengths, 4, 8, step) for step in range(60)]
    assert forwards[:25] != forwards[25:50], "the second epoch has another order"


def test_batches_hold_similar_lengths_in_random_order() -> None:
    lengths = [(37 * i) % 100 + 1 for i in range(400)]
    batches = [batch_at(lengths, 8, 0, step) for step in range(50)]
    padded = sum(8 * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.15 * sum(lengths)
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest != sorted(longest)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 8))
def test_shards_are_a_partition(lengths: list[int], count: int) -> None:
    parts = shards(lengths, count)
    assert sorted(itertools.chain(*parts)) == list(range(len(lengths)))
    assert len(parts) == min(count, len(lengths)) and all(parts)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=3, max_size=8), st.integers(2, 3))
def test_no_other_cut_has_a_smaller_largest_part(lengths: list[int], count: int) -> None:
    def cost(parts: list[list[int]]) -> int:
        return max(len(part) * max(lengths[i] for i in part) for part in parts)

    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    others = (
        [order[i:j] for i, j in itertools.pairwise([0, *cuts, len(order)])]
        for cuts in itertools.combinations(range(1, len(order)), count - 1)
    )
    assert cost(shards(lengths, count)) == min(map(cost, others))
