"""What the page can ask: a module a view, each with ROUTES. They query; app.py serves and export.py writes."""

import importlib
import pkgutil

from hooked_vla.atlas.routes import Route
from hooked_vla.atlas.run import Run


def all_routes(live: bool) -> list[Route]:
    """Of every view; live: with those that simulate, and post, too.

    Raises ValueError for a path that two routes have.
    """
    found: dict[tuple[str, str], Route] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name == "live" and not live:
            continue
        for route in getattr(importlib.import_module(f"{__name__}.{module.name}"), "ROUTES", ()):
            if (route.method, route.path) in found:
                raise ValueError(f"two routes answer {route.method} {route.path}")
            found[route.method, route.path] = route
    return list(found.values())


def first_view(run: Run) -> str:
    """The view that a page begins with: of what the run holds, that which says most about it."""
    if run.experiments:
        return "experiments"
    return "episodes" if run.rollouts else "features" if run.indexes or run.steering else "experiments"
