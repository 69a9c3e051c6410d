"""Command lines on pages: the commands exist and take these options, make's targets and files are there."""

import re
import tomllib
from typing import Any

import pytest
import typer
from pages import PAGES, ROOT, commands

from hooked_vla.cli import app

LINES = [line for page in PAGES for line in commands(page)]
OURS = [line for line in LINES if line[1][0] == "hooked-vla"]
# what begins a line of a block and is another project's
OTHERS = {"accelerate", "docker", "ray"}


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command, or group of commands, that the words name, and its arguments."""
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    while rest and hasattr(command, "commands"):
        known = command.commands
        assert rest[0] in known, f"no command {' '.join(words)!r}; there are {list(known)}"
        command, rest = known[rest[0]], rest[1:]
    return command, rest


def check_command(words: list[str], whole: bool = True) -> None:
    """Raises unless the command line could be carried out, but for names in capitals that stand for the reader's.

    whole: nothing may be missing.
    """
    command, arguments = command_of(words)
    a_group = hasattr(command, "commands")
    if "..." in arguments or not arguments or (a_group and arguments[0].isupper()):
        return
    try:
        command.make_context(words[0], arguments)
    except Exception as error:
        message = f"{type(error).__name__}: {getattr(error, 'message', error)}"
        stands_for_something = any(word.isupper() and word in message for word in arguments)
        missing = "MissingParameter" in message or "requires an argument" in message
        assert stands_for_something or (missing and not whole), f"{' '.join(words)}: {message}"


@pytest.mark.parametrize(("where", "words", "whole"), OURS, ids=[line[0] for line in OURS])
def test_hooked_vla(where: str, words: list[str], whole: bool) -> None:
    check_command(words, whole)


def test_there_are_some() -> None:
    assert len(OURS) > 30


@pytest.mark.parametrize(
    "line",
    ["hooked-vla rollout", "hooked-vla sae train --sight x", "hooked-vla info a b", "hooked-vla serve --port many"],
)
def test_wrong_ones_are_noticed(line: str) -> None:
    with pytest.raises(AssertionError):
        check_command(line.split())


def test_other_commands() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for where, words, _ in LINES:
        if words[0] == "hooked-vla":
            continue
        if words[0].endswith((".py", ".sh")):
            assert (ROOT / words[0]).is_file(), f"{where}: no file {words[0]}"
        elif words[0] == "make":
            assert all(word in targets or "=" in word for word in words[1:]), f"{where}: {words}"
        elif words[0] == "python":
            file = next((word for word in words[1:] if word.endswith(".py")), None)
            assert file is None or (ROOT / file).is_file() or "/" not in file, f"{where}: no file {file}"
        elif words[0] == "pip":
            named = {
                extra for word in words for found in re.findall(r"\[([\w,-]+)\]", word) for extra in found.split(",")
            }
            assert named <= extras, f"{where}: no extras {named - extras}"
        else:
            assert words[0] in OTHERS, f"{where}: {words[0]!r} is neither ours nor known"
