"""Files that appear when complete, manifests that say what a folder holds, one writer at a time, the user's cache."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


def write_file(path: Path, content: bytes) -> None:
    """Write a file that appears under its name when it is complete, in a folder that is made if need be.

    Raises OSError naming a file when that fails; no part of it is then left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        # writing, unlike opening, does not say which file it was
        error.filename = error.filename or str(path)
        raise


def write_json(path: Path, content: Any) -> None:
    """`write_file` for readable JSON."""
    write_file(path, (json.dumps(content, indent=1) + "\n").encode())


@contextmanager
def new_folder(folder: Path, replace: bool = True) -> Iterator[Path]:
    """A folder to fill, which gets its name when the block ends, in place of an earlier one; nothing of it is left
    where the block fails, and what a killed process left is cleared.

    replace: False where there must be no earlier one.
    Raises BlockingIOError where the same folder is being filled already; FileExistsError where there is one that must
    not be replaced, also if it came meanwhile.
    """
    _check_free(folder, replace)
    making = folder.with_name(f".{folder.name}.tmp")
    held = _claim(making, folder)
    try:
        try:
            for left in making.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            yield making
            _check_free(folder, replace)
            shutil.rmtree(folder, ignore_errors=True)
            making.replace(folder)
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
    finally:
        os.close(held)


def _check_free(folder: Path, replace: bool) -> None:
    if not replace and folder.exists():
        raise FileExistsError(f"{folder} is there already: choose another folder")


def _claim(making: Path, folder: Path) -> int:
    """A locked descriptor of a folder, made if need be. Raises BlockingIOError where another has it."""
    while True:
        making.mkdir(parents=True, exist_ok=True)
        held = os.open(making, os.O_RDONLY)
        try:
            lock(held, f"writing {folder}")
            # until the lock was there, its owner may have given the folder its name, and it is not this one any more
            if making.is_dir() and os.path.samestat(os.fstat(held), making.stat()):
                return held
        except BaseException:
            os.close(held)
            raise
        os.close(held)


def stamp(file: Path) -> tuple[int, int]:
    """What tells a file from another that was put in its place. Raises OSError where it is not there."""
    told = file.stat()
    return told.st_mtime_ns, told.st_size


def user_cache() -> Path:
    """This package's folder in the user's cache directory; not made yet.

    XDG_CACHE_HOME counts where it is absolute, as the XDG base directory specification has it.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    with suppress(OSError):
        home = home.resolve()
    return home / "hooked-vla"


def read_manifest(path: Path, format: str, holds: str) -> dict[str, Any]:
    """What a folder's manifest says. format: as it names its own; holds: what the folder would hold, "an index".

    Raises FileNotFoundError where there is none, ValueError for one that is damaged or of another format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: not {holds}")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict) or found.get("format") != format:
        raise ValueError(f"{path} is not of the format {format!r}")
    return found


def lock(opened: IO[Any] | int, doing: str) -> None:
    """Lock an open file, or folder, for this process until it is closed. doing: what holds the lock, "training in F".

    Raises BlockingIOError saying that another process is doing it.
    """
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, f"another process is {doing}") from error
