"""VQ-BeT: images cropped to the encoder's size."""

from hooked_vla.processors.visuomotor import KeypointProcessor

PROCESSOR = KeypointProcessor
