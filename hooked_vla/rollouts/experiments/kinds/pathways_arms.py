"""What one pathway's injection is set against: donors of other starts, and noise of the same size."""

from hooked_vla.rollouts.matched_noise import EPISODE, STEP

# put into an episode: another task's run from the same start; one from another start; noise as large as the first, in
# one direction all along the episode, or in another at every call
DONOR, RANDOM, NOISE, WHITE = "donor", "random donor", "noise", "white noise"
CONDITIONS = (DONOR, RANDOM, NOISE, WHITE)
LASTS = {NOISE: EPISODE, WHITE: STEP}
