"""A small MuJoCo tabletop: blocks, pads, and a gantry gripper that picks and places by real contact.

Importing this registers the Gymnasium id `hooked_vla/Tabletop-v0`.
"""

from hooked_vla.rollouts import needs_sim_extra

with needs_sim_extra():
    import gymnasium

    from hooked_vla.rollouts.tabletop.env import TabletopEnv, observation
    from hooked_vla.rollouts.tabletop.scene import BLOCKS, PADS

ENV_ID = "hooked_vla/Tabletop-v0"

# a scripted pick and place takes about 95 steps
gymnasium.register(ENV_ID, "hooked_vla.rollouts.tabletop.env:TabletopEnv", max_episode_steps=200)

__all__ = ["BLOCKS", "ENV_ID", "PADS", "TabletopEnv", "observation"]
