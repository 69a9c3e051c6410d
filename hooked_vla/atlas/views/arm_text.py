"""What an arm does, in a line, from the description of it that a manifest holds."""

from collections.abc import Mapping
from typing import Any

# of a list, and of a text, what a page shows
_ENTRIES, _LETTERS = 6, 300
# of an edit, what comes first or is told in words
_NAMED = ("edit", "site", "sites", "format", "version")


def arm_text(about: Mapping[str, Any]) -> str:
    """A line; the whole of what is not known."""
    makers = {"baseline": lambda _: "no edit", "prompt": _prompt, "image": _image, "edits": _edits,
              "injection": _injection, "functions": lambda a: str(a.get("description", ""))}  # fmt: skip
    kind = str(about.get("kind"))
    try:
        # controls carry what they are the control of
        text = makers[kind](about) if kind in makers else f"{kind}: {_injection(about)}"
    except (AttributeError, KeyError, TypeError, IndexError):
        # made by another version, or by hand
        text = str(shortened(about))
    return _cut(text)


def told_text(about: Mapping[str, Any], task: str, seed: int) -> list[dict[str, Any]]:
    """What the policy is told in place of the instruction, where the description says it: [{"start", "text"}]; text
    None: the instruction itself."""
    told = about.get("told")
    found = []
    for entry in told if isinstance(told, list) else ():
        if not isinstance(entry, Mapping):
            continue
        text = entry.get("text")
        if isinstance(text, list):
            text = next((each[2] for each in text if isinstance(each, list) and each[:2] == [task, seed]), None)
        found.append({"start": entry.get("start", 0), "text": None if text is None else str(text)})
    return found


def shortened(value: Any, depth: int = 6) -> Any:
    """Descriptions may hold thousands of entries: the first few, and how many more there are."""
    if isinstance(value, Mapping):
        kept = {str(key): shortened(each, depth - 1) if depth else "…" for key, each in list(value.items())[:40]}
        return kept | ({"…": f"{len(value) - 40} more"} if len(value) > 40 else {})
    if isinstance(value, list):
        kept = [shortened(each, depth - 1) if depth else "…" for each in value[:_ENTRIES]]
        return kept + ([f"… {len(value) - _ENTRIES} more"] if len(value) > _ENTRIES else [])
    return _cut(value) if isinstance(value, str) else value


def _prompt(about: Mapping[str, Any]) -> str:
    if "change" in about:
        return f"prompt changed: {about['change']}"
    parts = []
    for entry in about["told"]:
        text = entry["text"]
        texts = [text] if not isinstance(text, list) else list(dict.fromkeys(each[2] for each in text))
        said = "its own instruction" if text is None else " / ".join(f"“{each}”" for each in texts[:2])
        more = f" and {len(texts) - 2} more" if len(texts) > 2 else ""
        parts.append(f"{said}{more}" + (f" from step {entry['start']}" if entry["start"] else ""))
    return f"told {', then '.join(parts)}"


def _image(about: Mapping[str, Any]) -> str:
    cameras = "" if about["cameras"] is None else f" of {', '.join(about['cameras'])}"
    strength = "" if about["strength"] == 1 else f", strength {about['strength']:g}"
    return f"pictures{cameras} changed: {about['change']}{strength}"


def _edits(about: Mapping[str, Any]) -> str:
    parts = []
    for edit in about["edits"]:
        more = [f"{name} {_brief(value)}" for name, value in edit.items() if name not in _NAMED and value is not None]
        parts.append(f"{edit['edit']} at {_brief(edit.get('site'))}" + (f" ({', '.join(more)})" if more else ""))
    return "; ".join(parts)


def _injection(about: Mapping[str, Any]) -> str:
    what = about["injection"]
    limits = [f"{name} {_brief(what[name])}" for name in ("tokens", "positions", "denoise", "env") if what.get(name)]
    text = f"another run's {_brief(what['sites'])} injected" + (f" ({', '.join(limits)})" if limits else "")
    return text + (f"; {_prompt(about)}" if about.get("told") else "")


def _brief(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_brief(each) for each in value[:3]) + (f" and {len(value) - 3} more" if len(value) > 3 else "")
    if isinstance(value, Mapping):
        return "{…}" if len(str(value)) > 60 else str(dict(value))
    return _cut(str(value), 60)


def _cut(text: str, letters: int = _LETTERS) -> str:
    return text if len(text) <= letters else f"{text[: letters - 1]}…"
