"""Attributes that blocks put back, whatever the order in which the blocks end."""

from itertools import permutations
from types import SimpleNamespace

import pytest

from hooked_vla.hooks.kept import kept


class Clock(SimpleNamespace):
    __hash__ = object.__hash__


def test_nested_blocks_put_back_what_they_found() -> None:
    clock = Clock(hour=1, minute=1)
    with kept(clock, "hour", "minute"):
        clock.hour = clock.minute = 2
        with pytest.raises(KeyError), kept(clock, "hour"):
            clock.hour = 3
            raise KeyError
        assert clock == Clock(hour=2, minute=2)
    assert clock == Clock(hour=1, minute=1)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_blocks_end_in_any_order(order: tuple[int, ...]) -> None:
    clock, blocks = Clock(hour=0, minute=0), []
    for number, names in enumerate((("hour",), ("hour", "minute"), ("hour",)), start=1):
        blocks.append(kept(clock, *names))
        blocks[-1].__enter__()
        for name in names:
            setattr(clock, name, number)
    still_open = {0, 1, 2}
    for number in order:
        blocks[number].__exit__(None, None, None)
        still_open.remove(number)
        # the latest of those still open rules
        assert clock.hour == max(still_open, default=-1) + 1
        assert clock.minute == (2 if 1 in still_open else 0)


def test_a_name_that_the_owner_lacks_is_told_before_anything_is_kept() -> None:
    clock = Clock(hour=1)
    with pytest.raises(AttributeError, match="minute"), kept(clock, "hour", "minute"):
        raise AssertionError
    with kept(clock, "hour"):
        clock.hour = 2
    assert clock.hour == 1
