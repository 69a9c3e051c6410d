"""Calls as users make them: without the runtime shape checks that pytest's option switches on."""

from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping


@contextmanager
def unchecked_shapes() -> Iterator[None]:
    """Runtime shape checks off; afterwards as they were. Also a decorator of a test: @unchecked_shapes()

    They take most of the time of what runs models, they would answer a wrong shape before an op's own message does, and
    torch.compile cannot trace them.
    """
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
