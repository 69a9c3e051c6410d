"""What one episode did, as columns: states, actions, phases, and where the hand and the objects were at every step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hooked_vla.atlas.routes import NotThere
from hooked_vla.atlas.run import RolloutFolder, Run
from hooked_vla.atlas.views.episode_index import EpisodeIndex
from hooked_vla.rollouts.sae.duck import FILE_ROWS, exactly

# metres and radians: a tenth of a millimetre
_DIGITS = 4
# of one file: an episode of an hour at 20 steps a second
_MAX_STEPS = 72_000

_XYZ = ("x", "y", "z")
_STEPS = (
    f"SELECT env_step, chunk, chunk_step, state, action, reward, phase, poses FROM {FILE_ROWS} ORDER BY env_step "
    f"LIMIT {_MAX_STEPS}"
)
_END = f"SELECT final_state, final_phase, final_poses, total_reward FROM {FILE_ROWS}"
_TWIST = ("Δx", "Δy", "Δz", "Δroll", "Δpitch", "Δyaw", "gripper")


@dataclass(frozen=True)
class Layout:
    """What the numbers of a suite's state and action are. hand: places of x, y(, z) in the state; holds: of what says
    that something is held, or how far the gripper is open, and what it is called; unit: of places; phases: in the order
    in which a task goes through them."""

    state: Sequence[str]
    action: Sequence[str]
    hand: Sequence[int] = ()
    holds: tuple[int, str] | None = None
    unit: str = "m"
    phases: Sequence[str] = ()


# as the environments make them (rollouts/tabletop/env.py and expert.py, libero/env.py, metaworld.py, pusht.py)
_TABLETOP = Layout(("x", "y", "z", "holds"), ("Δx", "Δy", "Δz", "suction"), (0, 1, 2), (3, "holds a block"),
                   phases=("approach", "descend", "grasp", "lift", "transport", "release"))  # fmt: skip
_LIBERO = Layout((*_XYZ, "axis-angle 1", "axis-angle 2", "axis-angle 3", "finger 1", "finger 2"), _TWIST, (0, 1, 2),
                 (6, "finger, m"))  # fmt: skip
_METAWORLD = Layout((*_XYZ, "gripper"), ("Δx", "Δy", "Δz", "gripper"), (0, 1, 2), (3, "gripper"))
_PUSHT = Layout(("x", "y"), ("x", "y"), (0, 1), None, "px")
_LAYOUTS = {**dict.fromkeys(("goal", "object", "spatial", "shift", "style"), _TABLETOP), "metaworld": _METAWORLD,
            **dict.fromkeys(("libero_goal", "libero_object", "libero_spatial", "libero_10"), _LIBERO),
            "pusht": _PUSHT}  # fmt: skip


def layout_of(suite: str, d_state: int, d_action: int) -> Layout:
    """The layout of a suite, its variants ("goal-moved") included; numbered columns for one that is not known."""
    known = _LAYOUTS.get(suite) or _LAYOUTS.get(suite.partition("-")[0])
    if known is not None and (len(known.state), len(known.action)) == (d_state, d_action):
        return known
    return Layout([f"state {i}" for i in range(d_state)], [f"action {i}" for i in range(d_action)])


def make_tracks(run: Run, index: EpisodeIndex, folder: RolloutFolder, number: int) -> dict[str, Any]:
    """The columns of an episode: n steps, and for states and places one more, after the last action.

    Raises NotThere for steps that are not there or cannot be read.
    """
    steps, last = _read(run, index, number)
    states = [_rounded(step["state"]) for step in steps] + [_rounded(last["final_state"])]
    actions = [_rounded(step["action"]) for step in steps]
    layout = layout_of(folder.manifest["suite"]["name"], len(states[0]), len(actions[0]))
    phases = [step["phase"] for step in steps]
    return {
        "n": len(steps), "state": states, "action": actions, "state_names": list(layout.state),
        "action_names": list(layout.action), "unit": layout.unit,
        "hand": {axis: [state[i] for state in states] for axis, i in zip(_XYZ, layout.hand, strict=False)} or None,
        "holds": None if layout.holds is None else {"name": layout.holds[1], "at": layout.holds[0]},
        "phases": list(layout.phases), "phase": [*phases, last["final_phase"]] if any(phases) else None,
        "chunk": [step["chunk"] for step in steps], "chunk_step": [step["chunk_step"] for step in steps],
        "reward": [step["reward"] for step in steps], "total_reward": last["total_reward"],
        "objects": _places([step["poses"] for step in steps] + [last["final_poses"]]),
    }  # fmt: skip


def _read(run: Run, index: EpisodeIndex, number: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    steps, episode = (index.episode_file(kind, number) for kind in ("steps", "episodes"))
    if steps is None or episode is None:
        raise NotThere(f"episode {number}: its steps are not in this run")
    try:
        rows, last = _rows(run, _STEPS, str(steps)), _rows(run, _END, str(episode))
    except Exception as error:  # whatever a file that somebody made can do to a reader
        raise NotThere(f"the steps of episode {number} cannot be read: {str(error).splitlines()[0][:300]}") from error
    lists = [row[name] for row in rows for name in ("state", "action")] + [row["final_state"] for row in last]
    if len(last) != 1 or not rows or not all(isinstance(each, list) and None not in each for each in lists):
        raise NotThere(f"episode {number} is damaged: it has {len(rows)} steps and {len(last)} ends")
    if len({len(row["state"]) for row in rows} | {len(last[0]["final_state"])}) > 1 or (
        len({len(row["action"]) for row in rows}) > 1
    ):
        raise NotThere(f"episode {number} is damaged: its states or actions are not all as wide")
    return rows, last[0]


def _rows(run: Run, asked: str, file: str) -> list[dict[str, Any]]:
    cursor = run.duckdb().execute(asked, [exactly(file)])
    names = [column[0] for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def _places(poses: Sequence[Mapping[str, Sequence[float]] | None]) -> list[dict[str, Any]]:
    """Objects, each with its places; one that never moves, as a place on the table, has one of them."""
    names = dict.fromkeys(name for pose in poses for name in pose or {})
    found = []
    for name in names:
        at = [(pose or {}).get(name) for pose in poses]
        if any(each is None or len(each) < 2 for each in at):
            continue
        axes = {axis: [round(float(each[i]), _DIGITS) for each in at if each is not None]
                for i, axis in enumerate(_XYZ) if all(each is not None and len(each) > i for each in at)}  # fmt: skip
        group, _, own = name.rpartition("/")
        fixed = all(len(set(values)) == 1 for values in axes.values())
        found.append({"name": own, "group": group, "fixed": fixed,
                      **{axis: values[:1] if fixed else values for axis, values in axes.items()}})  # fmt: skip
    return found


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(float(value), _DIGITS) for value in values]
