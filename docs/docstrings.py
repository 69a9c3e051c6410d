"""Docstrings as the API reference shows them: they are plain prose, which Markdown must not take for markup.

Also where `hooked_vla.kernels` is, whose sources are in a folder of another name.
"""

import re
from pathlib import Path
from typing import Any

from griffe import Extension, GriffeLoader, Module, Object

# a link in it has the package's name
KERNELS = Path(__file__).parent.parent / "kernels" / ".stubs"

# marks that prose and formulas have, and that Markdown would act upon
MARKUP = re.compile(r"([*_<\[\]#~^|])")


class Prose(Extension):
    """Escapes what Markdown would act upon, and fences examples and formulas."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """For every documented object."""
        if obj.docstring is not None and obj.docstring.lineno is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **_: Any) -> None:
        """Put the kernels where they are imported from."""
        if pkg.path == "hooked_vla" and "kernels" not in pkg.members:
            apart = GriffeLoader(search_paths=[KERNELS], extensions=loader.extensions)
            pkg.set_member("kernels", apart.load("hooked_vla.kernels"))


def as_markdown(text: str) -> str:
    """Indented blocks and `>>>` examples become fences; the rest is escaped outside of `code`."""
    blocks, lines = [], []
    kind = ""
    for line in [*text.split("\n"), None]:
        now = "" if line is None else _kind(line, kind)
        if line is None or now != kind:
            blocks.append(_block(kind, lines))
            kind, lines = now, []
        if line is not None:
            lines.append(line)
    return "\n".join(block for block in blocks if block)


def _kind(line: str, before: str) -> str:
    if line.startswith((">>> ", "... ")):
        return "python"
    if line.startswith("    ") or (not line.strip() and before == "text"):
        return "text"
    return "prose"


def _block(kind: str, lines: list[str]) -> str:
    if not lines:
        return ""
    if kind == "python":
        return "\n".join(["", "```python", *(line[4:] for line in lines), "```", ""])
    if kind == "text":
        return "\n".join(["", "```text", *(line[4:] for line in lines), "```", ""]) if "".join(lines).strip() else ""
    parts = re.split(r"(`[^`]+`)", "\n".join(lines))
    return "".join(part if part.startswith("`") else MARKUP.sub(r"\\\1", part) for part in parts)
