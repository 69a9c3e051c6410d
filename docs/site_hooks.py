"""What the site has beyond the files of docs/: pages that live elsewhere in the repository, executed notebooks, API
pages; and links to all of them.

Pages are written to be read in the repository, where a link leads to a file. On the site it leads to that file's page,
and where there is none, its text alone is left. A link to a file that does not exist is a warning, which `--strict`
makes an error.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

import api
import notebooks
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

logger = logging.getLogger("mkdocs.hooks.site")

ROOT = Path(__file__).parent.parent
# files of the repository -> pages of the site
OUTSIDE = {
    "benchmarks/README.md": "benchmarks.md",
    "kernels/README.md": "kernels.md",
    "CONTRIBUTING.md": "contributing.md",
}
OUTSIDE |= {
    str(card.relative_to(ROOT)): f"zoo/{card.parent.name}.md"
    for card in sorted(ROOT.glob("hooked_vla/zoo/*/README.md"))
}
MODULES = [module for group in api.GROUPS.values() for module in group]
# files that have a page which says the same
SHOWN_AS = {"README.md": "index.md"}
SHOWN_AS |= {api.source(module): f"reference/api/{module}.md" for module in MODULES}
SHOWN_AS |= {f"docs/tutorials/{name}.ipynb": f"tutorials/{name}.md" for name in notebooks.names()}
# code is left alone
LINK = re.compile(r"^```.*?^```|`[^`\n]+`|(!?)\[((?:[^\[\]`]|`[^`]*`)*)\]\(([^)\s]+)\)", re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put a page for each result and each module into the navigation."""
    reports = sorted(Path(config.docs_dir).glob("results/*/*/report.md"), key=_experiment)
    entries: dict[str, list[Any]] = {
        "Results": [{_title(report): str(report.relative_to(config.docs_dir))} for report in reports],
        "Trained policies": [page for page in OUTSIDE.values() if page.startswith("zoo/")],
        "API": [
            {group: [{module: SHOWN_AS[api.source(module)]} for module in modules]}
            for group, modules in api.GROUPS.items()
        ],
    }
    _extend(config.nav, entries)
    return config


def _extend(nav: Any, entries: dict[str, list[Any]]) -> None:
    for item in nav:
        for name, children in item.items() if isinstance(item, dict) else ():
            if name in entries:
                children.extend(entries[name])
            elif isinstance(children, list):
                _extend(children, entries)


def _experiment(report: Path) -> tuple[int, str]:
    return int(report.parts[-3].removeprefix("E")), report.parts[-2]


def _title(report: Path) -> str:
    return f"{report.parts[-3]}, {report.parts[-2]}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that no file of docs/ holds."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for module in MODULES:
        text = f"# {module}\n\n::: {module}\n"
        files.append(File.generated(config, SHOWN_AS[api.source(module)], content=text))
    for name in notebooks.names():
        text, pictures = notebooks.as_markdown(name)
        files.append(File.generated(config, f"tutorials/{name}.md", content=text))
        for picture, data in pictures.items():
            files.append(File.generated(config, f"tutorials/{picture}", content=data))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Lead links to pages instead of to files."""
    here = page.file.src_uri
    source = next((file for file, shown in OUTSIDE.items() if shown == here), f"docs/{here}")

    def relink(found: re.Match[str]) -> str:
        mark, text, target = found.groups()
        if target is None or re.match(r"[a-z]+:|#", target):
            return found[0]
        path, hash_, anchor = target.partition("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        shown = _shown(file, files)
        # a notebook links to itself for whoever wants the file
        if shown is not None and shown == here:
            shown = file.removeprefix("docs/")
        if shown is not None:
            return f"{mark}[{text}]({posixpath.relpath(shown, posixpath.dirname(here) or '.')}{hash_}{anchor})"
        if mark or not (ROOT / file).exists():
            logger.warning("%s links to %s, which is not there", source, target)
        return text

    return LINK.sub(relink, markdown)


def _shown(file: str, files: Files) -> str | None:
    """The page, picture or other file of the site that shows a file of the repository."""
    found = OUTSIDE.get(file) or SHOWN_AS.get(file)
    if found is None and f"{file}/README.md" in OUTSIDE:
        found = OUTSIDE[f"{file}/README.md"]
    if found is None and file.startswith("docs/"):
        inside = file.removeprefix("docs/")
        found = next((each for each in (inside, f"{inside}/README.md") if files.get_file_from_path(each)), None)
    return found
