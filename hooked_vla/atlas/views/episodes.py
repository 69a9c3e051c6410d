"""Episodes: which there are, how many succeed, and what one of them did, step by step.

A page of a list shows rows of the index (episode_index.py), or, until that is made, of the page's own files.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from hooked_vla.atlas.routes import NotThere, Route, once
from hooked_vla.atlas.run import RolloutFolder, Run
from hooked_vla.atlas.views.arm_text import arm_text, shortened, told_text
from hooked_vla.atlas.views.episode_index import COLUMNS, EpisodeIndex, episode_number, find_rollout
from hooked_vla.atlas.views.episode_tracks import make_tracks
from hooked_vla.rollouts.sae.duck import FILE_ROWS, exactly
from hooked_vla.rollouts.summary import Rate

PAGE = 200
# what an export holds of every folder of rollouts
EXPORTED_PAGES = 25
EXPORTED_TRACKS = 240

_ROWS = f"SELECT * EXCLUDE (damage), damage FROM {FILE_ROWS}"
_OUTCOMES = {"": "TRUE", "success": "success", "failure": "NOT success", "damaged": "damage IS NOT NULL"}
_ORDERS = {
    "": "episode",
    "longest": "n_steps DESC, episode",
    "shortest": "n_steps, episode",
    "task": "task, seed, episode",
}


def list_rollouts(run: Run) -> list[dict[str, Any]]:
    """Every folder of rollouts of the run, damaged ones with what is wrong."""
    found = []
    for key, folder in run.rollouts.items():
        row: dict[str, Any] = {"key": key, "path": run.shown(folder.path), "error": folder.error or _fault(folder)}
        if row["error"] is None:
            row |= _head(folder) | {
                "n_arms": len(folder.manifest["arms"]),
                "n_tasks": len({scene[0] for scene in folder.manifest["scenes"]}),
                "planned": len(folder.manifest["scenes"]) * len(folder.manifest["arms"]),
                "edited": _first_edited(run, folder),
            }
        found.append(row)
    return found


def get_rollout(run: Run, rollout: str) -> dict[str, Any]:
    """One folder: what ran, and the success of every arm, over all tasks and by task, once the index is there.

    Raises NotThere.
    """
    folder = _sound(run, rollout)
    manifest = folder.manifest
    index = EpisodeIndex.of(run, rollout)
    state = index.state()
    used = {scene[0] for scene in manifest["scenes"]}
    return {
        "key": rollout, "path": run.shown(folder.path), **_head(folder),
        "tasks": {task: text for task, text in manifest["suite"]["tasks"].items() if task in used},
        "arms": {name: {"kind": _kind(about), "text": arm_text(about), "about": shortened(about)}
                 for name, about in manifest["arms"].items()},
        "settings": manifest["settings"], "machine": manifest.get("machine"), "versions": manifest.get("versions"),
        "planned": len(manifest["scenes"]) * len(manifest["arms"]),
        "index": {"ready": state.ready, "done": state.done, "of": state.of, "error": state.error},
        "rates": _rates(run, str(state.file), manifest) if state.ready else None,
        "n": _count(run, str(state.file)) if state.ready else len(index.numbers()),
        "edited": _first_edited(run, folder), "per_page": PAGE,
        "files": f"{run.shown(folder.path)}/episodes/*/*.parquet",
    }  # fmt: skip


def get_page(run: Run, rollout: str, page: str) -> dict[str, Any]:
    """A page of all episodes in order, counted from 1. Raises NotThere."""
    return find_episodes(run, rollout, page=page)


def find_episodes(
    run: Run, rollout: str, arm: str = "", task: str = "", outcome: str = "", order: str = "", page: str = ""
) -> dict[str, Any]:
    """A page of the episodes of an arm, a task and an outcome ("success", "failure", "damaged"), or of all.

    Raises NotThere, ValueError for an unknown outcome or order, and for a filter before the index is made.
    """
    _sound(run, rollout)
    if outcome not in _OUTCOMES or order not in _ORDERS:
        raise ValueError(f"outcomes: {[*_OUTCOMES]}, orders: {[*_ORDERS]}; got {outcome!r}, {order!r}")
    number = episode_number(page or "1")
    start = (max(number, 1) - 1) * PAGE
    index = EpisodeIndex.of(run, rollout)
    state = index.state()
    if state.file is None:
        if arm or task or outcome or order:
            raise ValueError("episodes can be chosen once their table is made; try again in a moment")
        numbers = index.numbers()
        total, rows = len(numbers), index.rows(numbers[start : start + PAGE])
    else:
        where = f"(? = '' OR arm = ?) AND (? = '' OR task = ?) AND {_OUTCOMES[outcome]}"
        given = [exactly(state.file), arm, arm, task, task]
        cursor = run.duckdb()
        total = _one(cursor.execute(f"SELECT count(*) FROM {FILE_ROWS} WHERE {where}", given))
        asked = f"{_ROWS} WHERE {where} ORDER BY {_ORDERS[order]} LIMIT {PAGE} OFFSET ?"
        rows = _dicts(cursor.execute(asked, [*given, start]))
    if not rows and start:
        raise NotThere(f"there is no page {number}: {total} episodes make {-(-total // PAGE)} pages")
    return {
        "rows": rows,
        "page": max(number, 1),
        "pages": max(1, -(-total // PAGE)),
        "n": total,
        "indexed": state.ready,
    }


def get_episode(run: Run, rollout: str, episode: str) -> dict[str, Any]:
    """One episode: its row, its steps as tracks, and the same cell under the other arms (same task and seed).

    Raises NotThere.
    """
    folder = _sound(run, rollout)
    number = episode_number(episode)
    index = EpisodeIndex.of(run, rollout)
    row = next(iter(index.rows([number])), None)
    if row is None or row["damage"] == "its file is a link out of the run":
        raise NotThere(f"episode {number} is not recorded in {run.shown(folder.path)}")
    if row["damage"] is not None:
        raise NotThere(f"episode {number} cannot be shown: {row['damage']}")
    about = folder.manifest["arms"].get(row["arm"], {})
    return {
        **{name: row[name] for name in COLUMNS},
        "rollout": rollout, "path": run.shown(folder.path), "fps": _head(folder)["fps"],
        "arm_text": arm_text(about), "arm_kind": _kind(about),
        "told": told_text(about, row["task"], row["seed"]),
        "steps": make_tracks(run, index, folder, number),
        "cell": cell_of(run, rollout, row["task"], row["seed"]),
        "file": f"{run.shown(folder.path)}/steps/{number // 1000:03d}/{number:09d}.parquet",
    }  # fmt: skip


def cell_of(run: Run, rollout: str, task: str, seed: int) -> list[dict[str, Any]]:
    """The episodes of one task and seed, one an arm, in the arms' order: number, arm, and how it ended where known.

    Until the index is made the numbers are those that the manifest gives them (rollouts/cells.py).
    """
    folder = _sound(run, rollout)
    index = EpisodeIndex.of(run, rollout)
    state = index.state(0.0)
    if state.file is not None:
        asked = f"SELECT episode, arm, success, n_steps FROM {FILE_ROWS} WHERE task = ? AND seed = ? ORDER BY episode"
        found = _dicts(run.duckdb().execute(asked, [exactly(state.file), task, seed]))
    else:
        scenes = [tuple(scene) for scene in folder.manifest["scenes"]]
        at = scenes.index((task, seed)) if (task, seed) in scenes else None
        numbers = {} if at is None else {i * len(scenes) + at: arm for i, arm in enumerate(folder.manifest["arms"])}
        there = [number for number in numbers if index.episode_file("episodes", number) is not None]
        found = [
            {"episode": row["episode"], "arm": row["arm"], "success": row["success"], "n_steps": row["n_steps"]}
            for row in index.rows(there) if row["damage"] is None
        ]  # fmt: skip
    kinds = {name: _kind(about) for name, about in folder.manifest["arms"].items()}
    return [row | {"kind": kinds.get(row["arm"])} for row in found]


def exported_episodes(run: Run, limit: int = EXPORTED_TRACKS) -> Iterator[dict[str, str]]:
    """The first episodes of every folder, scene by scene: all arms of the first scene come before the second's."""
    for key in sound_keys(run):
        n_scenes = len(run.rollouts[key].manifest["scenes"])
        recorded = sorted(EpisodeIndex.of(run, key).numbers(), key=lambda number: (number % n_scenes, number))
        for number in recorded[:limit]:
            yield {"rollout": key, "episode": str(number)}


def _exported_rollouts(run: Run) -> Iterator[dict[str, str]]:
    for key in sound_keys(run):
        EpisodeIndex.of(run, key).wait()
        yield {"rollout": key}


def _exported_pages(run: Run) -> Iterator[dict[str, str]]:
    for key in sound_keys(run):
        n = len(EpisodeIndex.of(run, key).numbers())
        for page in islice(range(1, max(1, -(-n // PAGE)) + 1), EXPORTED_PAGES):
            yield {"rollout": key, "page": str(page)}


def sound_keys(run: Run) -> list[str]:
    return [key for key, folder in run.rollouts.items() if folder.error is None and _fault(folder) is None]


def _sound(run: Run, rollout: str) -> RolloutFolder:
    """Raises NotThere for an unknown folder, or one whose manifest says too little."""
    folder = find_rollout(run, rollout)
    if (wrong := folder.error or _fault(folder)) is not None:
        raise NotThere(f"{run.shown(folder.path)} cannot be shown: {wrong}")
    return folder


def _fault(folder: RolloutFolder) -> str | None:
    """What a manifest lacks of what is shown of it, if anything."""
    manifest = folder.manifest
    wanted = {"model": Mapping, "suite": Mapping, "arms": Mapping, "settings": Mapping, "scenes": list}
    for name, kind in wanted.items():
        if not isinstance(manifest.get(name), kind):
            return f"manifest.json has no {name!r}"
    if not isinstance(manifest["suite"].get("tasks"), Mapping) or not isinstance(manifest["suite"].get("name"), str):
        return "manifest.json names no suite with tasks"
    cells = manifest["scenes"]
    if not cells or not all(isinstance(each, list) and [type(v) for v in each] == [str, int] for each in cells):
        return "manifest.json's scenes are not pairs of task and seed"
    if not manifest["arms"] or not all(isinstance(each, Mapping) for each in manifest["arms"].values()):
        return "manifest.json describes no arms"
    return None


def _head(folder: RolloutFolder) -> dict[str, Any]:
    manifest = folder.manifest
    return {
        "model": manifest["model"].get("name"), "weights": manifest["model"].get("weights"),
        "suite": manifest["suite"]["name"], "fps": manifest["suite"].get("fps") or 20,
        "cameras": list(dict.fromkeys((manifest["settings"].get("cameras") or {}).values())),
        "max_steps": manifest["settings"].get("max_steps"),
    }  # fmt: skip


def _first_edited(run: Run, folder: RolloutFolder) -> int | None:
    """The first scene's episode under the first arm that edits, by its number; None where that is not recorded."""
    arms = [_kind(about) for about in folder.manifest["arms"].values()]
    edited = next((i for i, kind in enumerate(arms) if kind != "baseline"), None)
    if edited is None or "baseline" not in arms:
        return None
    number = edited * len(folder.manifest["scenes"])
    return number if EpisodeIndex.of(run, folder.key).episode_file("episodes", number) is not None else None


def _kind(about: Mapping[str, Any]) -> str:
    return str(about.get("kind", "unknown"))


def _rates(run: Run, file: str, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of every arm, its rate over all tasks ("task" None) and of each task, in the manifest's order."""
    asked = (
        f"SELECT arm, task, sum(success::INTEGER)::INTEGER, count(*)::INTEGER FROM {FILE_ROWS} WHERE damage IS NULL "
        "GROUP BY GROUPING SETS ((arm), (arm, task))"
    )
    found = run.duckdb().execute(asked, [exactly(file)]).fetchall()
    arms = {name: i for i, name in enumerate(manifest["arms"])}
    tasks = {name: i for i, name in enumerate(manifest["suite"]["tasks"])}
    found.sort(key=lambda each: (arms.get(each[0], len(arms)), each[0], each[1] is not None, tasks.get(each[1], 0)))
    rows = []
    for arm, task, successes, n in found:
        rate = Rate.of(successes, n)
        rows.append({"arm": arm, "task": task, "episodes": n, "successes": successes, "rate": rate.success_rate,
                     "low": rate.interval[0], "high": rate.interval[1]})  # fmt: skip
    return rows


def _count(run: Run, file: str) -> int:
    return _one(run.duckdb().execute(f"SELECT count(*) FROM {FILE_ROWS}", [exactly(file)]))


def _one(cursor: Any) -> int:
    return int(cursor.fetchone()[0])


def _dicts(cursor: Any) -> list[dict[str, Any]]:
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


ROUTES = [
    Route("rollouts", list_rollouts, listing=once),
    Route("rollouts/{rollout}", get_rollout, listing=_exported_rollouts),
    Route("rollouts/{rollout}/page/{page}", get_page, listing=_exported_pages),
    Route("rollouts/{rollout}/find", find_episodes, query=("arm", "task", "outcome", "order", "page")),
    Route("rollouts/{rollout}/episode/{episode}", get_episode, listing=exported_episodes),
]
