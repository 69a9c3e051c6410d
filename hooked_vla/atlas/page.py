"""The page's own files, and the one document that loads them, served or exported."""

import html
import json
from importlib import resources
from pathlib import Path
from typing import Any

from hooked_vla.extras import needs_packages

with needs_packages(("plotly",), "the Atlas needs: pip install 'hooked-vla[atlas]'"):
    import plotly

FOLDER = Path(str(resources.files("hooked_vla.atlas"))) / "page"
# in the order of the page's menu; live comes with a server that simulates
VIEWS = ("models", "episodes", "features", "experiments", "live")
KINDS = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}


def assets(live: bool) -> dict[str, Path]:
    """Files that the page loads, by name, in their order: the shell, what views share, the views. live: with the view
    that simulates."""
    found = {
        path.name: path for path in sorted(FOLDER.iterdir()) if path.suffix in KINDS and (live or path.stem != "live")
    }
    views = [f"{view}.js" for view in VIEWS]
    first = [name for name in ("app.css", "app.js") if name in found]
    last = [name for name in views if name in found]
    between = [name for name in found if name not in (*first, *last)]
    plotly_file = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    return {"plotly.min.js": plotly_file, **{name: found[name] for name in (*first, *between, *last)}}


def document(about: dict[str, Any], live: bool, policy: str | None = None, data: bool = False) -> str:
    """index.html. about: what app.js knows before it asks anything; policy: a content security policy in the page
    itself, for a copy that no server sends one with; data: data/index.js says what there is."""
    names = assets(live)
    # plotly is read by app.js when something is plotted
    scripts = [name for name in names if name.endswith(".js") and name != "plotly.min.js"]
    first = ("data/index.js",) if data else ()
    tags = "".join(f'<script defer src="{name}"></script>\n' for name in (*first, *scripts))
    styles = "".join(f'<link rel="stylesheet" href="{name}">\n' for name in names if name.endswith(".css"))
    head = f'<meta name="atlas" content="{html.escape(json.dumps(about), quote=True)}">\n'
    if policy is not None:
        # before anything that it is to hold for
        head = f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy, quote=True)}">\n' + head
    text = (FOLDER / "index.html").read_text(encoding="utf-8")
    return text.replace("<!-- head -->", head).replace("<!-- scripts -->", styles + tags)
