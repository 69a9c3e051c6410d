"""Attributes that are put back when a block ends, also where blocks overlap without nesting."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

_open: WeakKeyDictionary[Any, list[dict[str, Any]]] = WeakKeyDictionary()


@contextmanager
def kept(owner: object, *names: str) -> Iterator[None]:
    """What the block makes of these attributes of `owner` is undone at its end.

    A generator that is left half-way ends its block whenever it is collected, in the middle of a later block perhaps.
    Then the attributes stay what the later block made of them, and its end puts back what was before both.
    """
    before = {name: getattr(owner, name) for name in names}
    blocks = _open.setdefault(owner, [])
    blocks.append(before)
    try:
        yield
    finally:
        at = next(i for i, block in enumerate(blocks) if block is before)
        later = blocks[at + 1 :]
        del blocks[at]
        for name, value in before.items():
            heir = next((block for block in later if name in block), None)
            if heir is None:
                setattr(owner, name, value)
            else:
                heir[name] = value
