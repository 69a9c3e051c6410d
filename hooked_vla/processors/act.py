"""ACT: images go into the network at their own size."""

from hooked_vla.processors.visuomotor import VisuomotorProcessor

PROCESSOR = VisuomotorProcessor
