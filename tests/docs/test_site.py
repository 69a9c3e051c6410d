"""The site: built strictly, it warns of nothing, asks for nothing from elsewhere, and none of its links is dead."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from pages import ROOT

# what a browser fetches without being asked
FETCHED = {
    "script": ("src",), "img": ("src", "srcset"), "source": ("src", "srcset"), "iframe": ("src",), "video": ("src",),
    "audio": ("src",), "embed": ("src",), "object": ("data",), "input": ("src",),
}  # fmt: skip
FETCHED_RELATIONS = {
    "stylesheet",
    "icon",
    "preload",
    "prefetch",
    "preconnect",
    "dns-prefetch",
    "modulepreload",
    "manifest",
}


class Links(HTMLParser):
    """What a page fetches, where it links to, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.linked: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.fetched += [given[name] for name in FETCHED.get(tag, ()) if name in given]
        if tag == "link" and set(given.get("rel", "").split()) & FETCHED_RELATIONS:
            self.fetched.append(given["href"])
        if tag == "a" and "href" in given:
            self.linked.append(given["href"])
        self.fetched += re.findall(r"url\(([^)]*)\)", given.get("style", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    # a message of the theme's makers to its users
    done = subprocess.run(
        build, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "WARNING" not in done.stderr, done.stderr[-4000:]
    return target


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Links]:
    return {path: Links(path.read_text()) for path in site.rglob("*.html")}


def test_every_page_is_there(site: Path, pages: dict[Path, Links]) -> None:
    sources = [path for path in (ROOT / "docs").rglob("*.md") if path.name != "README.md"]
    missing = [path for path in sources if not (site / path.relative_to(ROOT / "docs")).with_suffix(".html").is_file()]
    assert not missing and len(pages) > 80
    for name in (
        "kernels",
        "benchmarks",
        "zoo/pi05-tabletop",
        "tutorials/steer_a_feature",
        "reference/api/hooked_vla.vla",
    ):
        assert (site / f"{name}.html").is_file(), name
    assert "run_with_cache" in (site / "reference" / "api" / "hooked_vla.hooks.model.html").read_text()


def test_nothing_is_fetched_from_elsewhere(site: Path, pages: dict[Path, Links]) -> None:
    outside = {(path.name, target) for path, page in pages.items() for target in page.fetched
               if urlsplit(target).netloc or urlsplit(target).scheme not in ("", "data")}  # fmt: skip
    assert not outside
    for path in site.rglob("*.css"):
        fetched = re.findall(r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"')]*)", path.read_text())
        assert not fetched, (path.name, fetched)


def leads_somewhere(path: Path, target: str, pages: dict[Path, Links]) -> bool:
    """Whether a link on a page of the site leads to a file, and to an anchor in it; those to elsewhere do."""
    parts = urlsplit(target)
    if parts.scheme or parts.netloc or not (parts.path or parts.fragment):
        return True
    file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    file = file / "index.html" if file.is_dir() else file
    # "__...": the theme's own, which its script answers
    if file not in pages or not parts.fragment or parts.fragment.startswith("__"):
        return file.is_file()
    return unquote(parts.fragment) in pages[file].anchors


def test_no_link_is_dead(site: Path, pages: dict[Path, Links]) -> None:
    dead = [
        (path.relative_to(site).as_posix(), target)
        for path, page in pages.items()
        # the page for wrong addresses links from the root of whatever serves it
        if path.name != "404.html"
        for target in (*page.linked, *page.fetched)
        if not leads_somewhere(path, target, pages)
    ]
    assert not dead


def test_a_dead_link_fails_the_build(tmp_path: Path) -> None:
    """What the checks above rely on."""
    sys.path.insert(0, str(ROOT / "docs"))
    import site_hooks  # pyright: ignore[reportMissingImports]

    class Missing:
        def get_file_from_path(self, _: str) -> None:
            return None

    class Here:
        class file:
            src_uri = "tour.md"

    warned = []
    handler = site_hooks.logger.warning
    try:
        site_hooks.logger.warning = lambda *given: warned.append(given)
        text = site_hooks.on_page_markdown(
            "[a](../no/such.py) [b](../README.md) `[c](d)` [e](../Makefile)", Here, Missing()
        )
    finally:
        site_hooks.logger.warning = handler
    assert text == "a [b](index.md) `[c](d)` e" and len(warned) == 1
