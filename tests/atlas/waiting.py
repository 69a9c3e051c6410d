"""Waiting for a page."""

import time


def until(page, expression: str, seconds: float = 30) -> None:
    """Wait for a JavaScript expression to hold; the page forbids what Playwright's own waiting evaluates."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"not within {seconds} s: {expression}"
        page.wait_for_timeout(50)
