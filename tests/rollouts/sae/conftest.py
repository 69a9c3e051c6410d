"""Autoencoders are collected for, trained and steered as users do it."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _as_users_run_them(unchecked_shapes: None) -> None:
    pass
