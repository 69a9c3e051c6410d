"""Experiments run as users run them."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _as_users_run_them(unchecked_shapes: None) -> None:
    pass
