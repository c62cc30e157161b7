from hypothesis import given
from hypothesis import strategies as st

from ldgan.engine.shares import batches, share


@given(st.integers(0, 200), st.integers(1, 20))
def test_shares_are_every_number_once_in_order_and_differ_by_one_at_most(num_items, world_size):
    shares = [share(num_items, rank, world_size) for rank in range(world_size)]
    assert [number for numbers in shares for number in numbers] == list(range(num_items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 20))
def test_batches_are_full_but_for_the_last(first, num_items, batch_size):
    numbers = range(first, first + num_items)
    pieces = list(batches(numbers, batch_size))
    assert [number for piece in pieces for number in piece] == list(numbers)
    assert all(len(piece) == batch_size for piece in pieces[:-1])
    assert all(1 <= len(piece) <= batch_size for piece in pieces)
