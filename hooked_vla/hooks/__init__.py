"""Named hook points, listeners that never leak, and the cache of what they saw."""

from hooked_vla.hooks.cache import Activation, ActivationCache
from hooked_vla.hooks.model import Hook, HookedModel
from hooked_vla.hooks.point import HookPoint
from hooked_vla.hooks.sites import HookSite

__all__ = ["Activation", "ActivationCache", "Hook", "HookPoint", "HookSite", "HookedModel"]
