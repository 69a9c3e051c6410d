"""Serving a policy to other people's evaluation: openpi's websocket wire, and AllenAI's vla-eval harness.

>>> from hooked_vla.serving.server import serve, serving
>>> serve(model)                                        # until interrupted, for openpi's clients
>>> with serving(model, "vla-eval", edits=[("vlm.blocks.8.hook_resid_post", ablate)]) as server:
...     print(server.url)                               # in the background, with an edit in the served model

LeRobot's own loop needs no server: `HookedVLA` has its `reset`, `select_action` and `predict_action_chunk`.
"""

from contextlib import AbstractContextManager

from hooked_vla.extras import needs_packages


def needs_serve_extra() -> AbstractContextManager[None]:
    """`needs_packages` for the `serve` extra."""
    return needs_packages(("msgpack", "websockets"), "serving needs: pip install 'hooked-vla[serve]'")


def needs_harness_extra() -> AbstractContextManager[None]:
    """`needs_packages` for the `vla-eval` extra."""
    return needs_packages(("vla_eval",), "a vla-eval model server needs: pip install 'hooked-vla[vla-eval]'")
