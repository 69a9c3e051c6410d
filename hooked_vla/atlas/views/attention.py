"""Where a policy looked at one step of an episode: asked of a worker, which runs it again, and kept in a cache.

Addresses write the colon of a token segment ("image:top") as "~", since they become names of files in an export.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from hooked_vla.atlas.routes import NotThere, Route
from hooked_vla.atlas.run import Run
from hooked_vla.atlas.views.episode_index import EpisodeIndex, episode_number, find_rollout
from hooked_vla.atlas.views.episodes import exported_episodes
from hooked_vla.atlas.views.replayed import fair, replays
from hooked_vla.atlas.worker import WorkError
from hooked_vla.folders import stamp, write_file

ATTENTION_S = 240.0
# answers that are kept; one of a small model takes 10 kB
KEPT = 4000
# of an export: episodes of a folder and plans of an episode, and such plans and their maps in all
EXPORTED, EXPORTED_PLANS, EXPORTED_IN_ALL, EXPORTED_MAPS = 2, 2, 96, 480
# maps of one plan
_MAPS = 60
_MAX_STEP = 10**6


def get_choices(run: Run, rollout: str, episode: str, step: str) -> dict[str, Any]:
    """What there is to see at a step: attention patterns with their heads, steps and askers, and the pictures.

    "error" in place of it says why there is nothing. Raises NotThere for an episode that is not recorded.
    """
    return _asked(run, rollout, episode, step, "", "")


def get_attention(run: Run, rollout: str, episode: str, step: str, site: str, queries: str) -> dict[str, Any]:
    """Maps of one pattern, for one token segment that asks ("all": every token). Raises as `get_choices`."""
    return _asked(run, rollout, episode, step, site, queries.replace("~", ":"))


def _asked(run: Run, rollout: str, episode: str, step: str, site: str, queries: str) -> dict[str, Any]:
    folder, number, at = find_rollout(run, rollout), episode_number(episode), episode_number(step)
    index = EpisodeIndex.of(run, rollout)
    row, steps = index.episode_file("episodes", number), index.episode_file("steps", number)
    if row is None or steps is None:
        raise NotThere(f"episode {number} is not recorded in {run.shown(folder.path)}")
    if at > _MAX_STEP or len(site) > 200 or len(queries) > 100:
        raise NotThere("there is no such step or site")
    n = folder.manifest.get("settings", {}).get("n_action_steps")
    # steps of one plan share its answer
    at -= at % n if isinstance(n, int) and n > 0 else 0
    stamps = [stamp(each) for each in (row, steps, folder.path / "manifest.json")]
    name = hashlib.sha256(repr((rollout, number, stamps, at, site, queries)).encode()).hexdigest()[:32]
    file = run.cache / "attention" / f"{name}.json"
    with suppress(OSError, ValueError):
        return json.loads(file.read_text())
    asked = {"folder": str(folder.path), "episode": number, "step": at, "site": site, "queries": queries}
    try:
        found = replays(run).run("attention", asked, ATTENTION_S) | {"error": None}
    except WorkError as error:
        return {"error": str(error)}
    _keep(file, found)
    return found


def _keep(file: Path, found: Mapping[str, Any]) -> None:
    # a full disk costs the time of making it again
    with suppress(OSError):
        write_file(file, json.dumps(found).encode())
        kept = sorted(file.parent.glob("*.json"), key=lambda each: each.stat().st_mtime)
        for each in kept[: max(0, len(kept) - KEPT)]:
            each.unlink(missing_ok=True)


def exported_choices(run: Run) -> Iterator[dict[str, str]]:
    """The plans that an export holds: the first of every folder's first episodes, EXPORTED_IN_ALL in all."""
    folders = groupby(exported_episodes(run, EXPORTED), itemgetter("rollout"))
    return fair((_plans(run, key, list(episodes)) for key, episodes in folders), EXPORTED_IN_ALL)


def _plans(run: Run, key: str, episodes: Sequence[dict[str, str]]) -> Iterator[dict[str, str]]:
    n = run.rollouts[key].manifest["settings"].get("n_action_steps")
    for plan in range(EXPORTED_PLANS if isinstance(n, int) else 0):
        # episodes side by side: the page compares them
        yield from ({**each, "step": str(plan * (n or 1))} for each in episodes)


def exported_attention(run: Run) -> Iterator[dict[str, str]]:
    """The maps that an export holds of these plans, EXPORTED_MAPS in all."""
    return fair((_maps(run, each) for each in exported_choices(run)), EXPORTED_MAPS)


def _maps(run: Run, plan: dict[str, str]) -> Iterator[dict[str, str]]:
    sites = [site for site in get_choices(run, **plan).get("sites", ()) if site["sees"]]
    # the page begins with the last site that an action depends on, and the last asker
    sites = sorted(reversed(sites), key=lambda site: not site["reaches_action"])
    pairs = ((site["site"], queries) for site in sites for queries in reversed(site["queries"]))
    for site, queries in islice(pairs, _MAPS):
        yield {**plan, "site": site, "queries": queries.replace(":", "~")}


ROUTES = [
    Route("rollouts/{rollout}/episode/{episode}/attention/{step}", get_choices, listing=exported_choices,
          replays=True),
    Route("rollouts/{rollout}/episode/{episode}/attention/{step}/{site}/{queries}", get_attention,
          listing=exported_attention, replays=True),
]  # fmt: skip
