"""Work in advance: order, errors and the bound stay what they are without threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from ldgan.engine.threads import map_ahead


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_results_come_in_order(num_threads: int) -> None:
    first_may_end = threading.Event()

    def square(number: int) -> int:
        if number == 0 and num_threads > 1:  # the first one is the last to be done
            first_may_end.wait()
        elif number == 5:
            first_may_end.set()
        return number**2

    assert list(map_ahead(square, range(50), num_threads)) == [number**2 for number in range(50)]


def test_items_are_taken_no_further_than_asked_and_by_the_caller() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            assert threading.current_thread() is threading.main_thread()
            taken.append(number)
            yield number

    results = map_ahead(str, items(), num_threads=2, ahead=3)
    assert taken == []
    assert next(results) == "0"
    assert len(taken) == 7  # six in advance, and one for the first that is done
    results.close()
    assert len(taken) == 7


@pytest.mark.parametrize("num_threads", [0, 2])
def test_an_error_comes_in_its_place(num_threads: int) -> None:
    results = map_ahead(lambda number: 1 // (3 - number), range(10), num_threads)
    assert [next(results) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(results) == []
