"""Code in Markdown pages: found, and run or read as its kind is.

A fenced block is Python where it says so, commands where it says nothing or `bash`, and text otherwise. Python that
needs what a test machine may lack says so, where its reader sees it, in a first line `# needs: PACKAGE`.
"""

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [
        *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md",
        ROOT / "kernels" / "README.md", *ROOT.glob("hooked_vla/zoo/*/README.md"),
    ]
)  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NEEDS = re.compile(r"# needs: ([\w-]+)\n")


@dataclass(frozen=True)
class Block:
    """One fenced block. line: of the page, of its first line."""

    page: str
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def needs(self) -> str | None:
        """A package without which the block does not run."""
        found = NEEDS.match(self.text)
        return found[1] if found else None


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = (ROOT / page).read_text()
    return [Block(page, text.count("\n", 0, each.start()) + 2, each[1], each[2]) for each in FENCE.finditer(text)]


def python_blocks(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


def run(page: str, names: dict[str, Any], instead: Mapping[str, str] = {}) -> dict[str, Any]:
    """Run the Python of a page, block after block, in `names`, which is returned with what the page added.

    instead: text of the page -> what stands for it, for what only its reader has; each must occur.
    Blocks whose package is not installed are only parsed.
    """
    unused = set(instead)
    for block in python_blocks(page):
        text = block.text
        for written, stand_in in instead.items():
            if written in text:
                unused.discard(written)
                text = text.replace(written, stand_in)
        # errors name the page and its line
        code = compile(ast.parse("\n" * (block.line - 1) + text, block.where), block.where, "exec")
        if block.needs is None or importlib.util.find_spec(block.needs) is not None:
            exec(code, names)
    assert not unused, f"{page} no longer has {sorted(unused)}"
    return names


def commands(page: str) -> Iterator[tuple[str, list[str], bool]]:
    """(where, words, whole) of every command line in the page's blocks, and of `hooked-vla ...` in its text, which need
    not be whole."""
    for block in blocks(page):
        if block.language in ("", "bash", "console"):
            lines = block.text.replace("\\\n", "  ").split("\n")
            for i, line in enumerate(lines):
                words = shlex.split(line, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words:
                    # of whichever environment
                    words[0] = words[0].rpartition("/bin/")[2]
                    yield f"{page}:{block.line + i}", words, True
    text = FENCE.sub(lambda found: "\n" * found[0].count("\n"), (ROOT / page).read_text())
    for found in re.finditer(r"`(hooked-vla [^`]*)`", text):
        line = text.count("\n", 0, found.start()) + 1
        yield f"{page}:{line}", shlex.split(found[1]), False
