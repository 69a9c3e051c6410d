"""Serving a policy to other people's evaluation: openpi's websocket wire, and AllenAI's vla-eval harness.

>>> from hooked_vla.serving.server import serve, serving
>>> serve(model)                                        # until interrupted, for openpi's clients
>>> with serving(model, "vla-eval", edits=[("vlm.blocks.8.hook_resid_post", ablate)]) as server:
...     print(server.url)                               # in the background, with an edit in the served model

LeRobot's own loop needs no server: `HookedVLA` has its `reset`, `select_action` and `predict_action_chunk`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

_PACKAGES = {"websockets": "serve", "msgpack": "serve", "vla_eval": "vla-eval"}


@contextmanager
def needs_serving_extra() -> Iterator[None]:
    """Around imports of what serving needs: a missing package becomes an error that says how to install it.

    Raises ModuleNotFoundError.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES:
            raise
        raise ModuleNotFoundError(
            f"{package} is not installed; serving needs: pip install 'hooked-vla[{_PACKAGES[package]}]'", name=package
        ) from error
