"""The suites: which instruction, which objects in the scene, and where blocks may lie. Built like LIBERO's suites.

goal: one scene for all tasks, so only the instruction says which block goes where. object, spatial: the scene holds
the one block and the one pad that are meant. shift: the goal suite with blocks at places that the others never use.
style: how to move, said in words or (tasks ending in "-unsaid") not at all.
"""

from dataclasses import dataclass

from hooked_vla.rollouts.tabletop.scene import BLOCKS, PADS

# places of blocks: centres on the table, each drawn within JITTER of it along x and y
SLOTS = tuple((x, y) for y in (-0.20, -0.04) for x in (-0.18, 0.0, 0.18))
SHIFTED_SLOTS = tuple((x, y) for y in (-0.20, -0.04) for x in (-0.09, 0.09))
JITTER = 0.03


@dataclass(frozen=True)
class Style:
    """How the expert moves. speed: fraction of the fastest. height: of the cup over the table on its way, metres."""

    speed: float = 1.0
    height: float = 0.13


STYLES = {
    "fast": Style(),
    "slow": Style(speed=0.5),
    "high": Style(height=0.22),
    "low": Style(height=0.09),
}
_ADVERBS = {"fast": "quickly", "slow": "slowly", "high": "high above the table", "low": "low above the table"}
_PLACES = {"left": "orange", "middle": "purple", "right": "cyan"}


@dataclass(frozen=True)
class Task:
    """One instruction, the block and pad it means, what else is there, and how the expert does it."""

    id: str
    instruction: str
    block: str
    pad: str
    blocks: tuple[str, ...]
    pads: tuple[str, ...]
    slots: tuple[tuple[float, float], ...] = SLOTS
    style: Style = Style()


def _goals(slots: tuple[tuple[float, float], ...]) -> tuple[Task, ...]:
    return tuple(
        Task(f"{block}-{pad}", f"put the {block} block on the {pad} pad", block, pad, tuple(BLOCKS), tuple(PADS), slots)
        for block in BLOCKS
        for pad in PADS
    )


def _alone(task: str, instruction: str, block: str, pad: str, style: Style = Style()) -> Task:
    return Task(task, instruction, block, pad, (block,), (pad,), style=style)


TASKS: dict[str, tuple[Task, ...]] = {
    "goal": _goals(SLOTS),
    "object": tuple(_alone(block, f"put the {block} block on the purple pad", block, "purple") for block in BLOCKS),
    "spatial": tuple(
        _alone(place, f"put the red block on the {place} pad", "red", pad) for place, pad in _PLACES.items()
    ),
    "shift": _goals(SHIFTED_SLOTS),
    # a verb of their own: what "carry" means is said nowhere else
    "style": tuple(
        _alone(name, f"carry the red block to the purple pad {adverb}", "red", "purple", STYLES[name])
        for name, adverb in _ADVERBS.items()
    )
    + tuple(
        _alone(f"{name}-unsaid", "carry the red block to the purple pad", "red", "purple", STYLES[name])
        for name in _ADVERBS
    ),
}


def find_task(suite: str, task: str) -> Task:
    """A task by the names of its suite and its own.

    Raises ValueError with the names that there are.
    """
    if suite not in TASKS:
        raise ValueError(f"unknown suite {suite!r} of the tabletop; suites: {list(TASKS)}")
    found = {each.id: each for each in TASKS[suite]}
    if task not in found:
        raise ValueError(f"unknown task {task!r} in the suite {suite!r}; tasks: {list(found)}")
    return found[task]
