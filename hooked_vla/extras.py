"""Packages that only parts of the library need: where one is missing, the error says what to install."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager


@contextmanager
def needs_packages(packages: Sequence[str], remedy: str) -> Iterator[None]:
    """Around imports of optional packages: where one of them is missing, the error says what to do.

    packages: their import names; remedy: what needs them and how they are installed.
    Raises ModuleNotFoundError.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in packages:
            raise
        raise ModuleNotFoundError(f"{error.name} is not installed; {remedy}", name=error.name) from error


def needs_analysis_extra() -> AbstractContextManager[None]:
    """`needs_packages` for the `analysis` extra."""
    return needs_packages(
        ("kornia", "matplotlib", "pandas", "pyarrow", "scipy", "sklearn"),
        "analyses need: pip install 'hooked-vla[analysis]'",
    )
