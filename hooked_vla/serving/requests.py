"""What clients send, as an Observation: the spellings in use, and what is wrong with a request, said by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from hooked_vla.inputs import Observation
from hooked_vla.lerobot import IMAGES, OBS_STATE
from hooked_vla.spec import FeatureSpec

# openpi: policies/libero_policy.py ("observation/..."), policies/aloha_policy.py ("images", "state");
# vla-eval: types.py ("images", "task_description", "state"); LeRobot's batch keys
_STATE = ("state", "observation/state", OBS_STATE, "states")
_INSTRUCTION = ("prompt", "task_description", "task", "instruction")
_CAMERA_PREFIXES = ("observation/", IMAGES)


@dataclass(frozen=True)
class RequestReader:
    """Reads requests for one policy.

    features: the policy's cameras and widths. cameras: the client's name of a camera, or whole key -> the policy's;
    those that are not named keep their name. instruction: for requests that have none.
    """

    features: FeatureSpec
    cameras: Mapping[str, str] = field(default_factory=dict)
    instruction: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a camera map to cameras that the policy does not have."""
        unknown = sorted(set(self.cameras.values()) - set(self.features.cameras))
        if unknown:
            raise ValueError(f"the policy has no cameras {unknown}; its cameras: {list(self.features.cameras)}")

    def __call__(self, request: Any) -> Observation:
        """One observation, without a batch axis.

        Raises TypeError for a request that is not a map or an entry of the wrong type, ValueError for missing entries
        and wrong shapes; the message names the entry, what was expected, and what there is.
        """
        if not isinstance(request, Mapping):
            raise TypeError(f"a request is a map of observations, got {type(request).__name__}")
        images = self._images(request)
        wanted = [camera for camera in self.features.cameras if camera not in images]
        if len(wanted) > self.features.empty_cameras:
            raise ValueError(
                f"no image for the cameras {wanted}: the request has {sorted(map(str, request))} and shows "
                f"{sorted(images)}; name the client's cameras with a camera map"
            )
        return Observation(images, self._state(request), self._instruction(request))

    def _images(self, request: Mapping[Any, Any]) -> dict[str, UInt8[np.ndarray, "height width 3"]]:
        given: dict[str, Any] = {}
        nested = request.get("images", {})
        if not isinstance(nested, Mapping):
            raise TypeError(f"'images' is a map from camera to image, got {type(nested).__name__}")
        given.update(nested)
        for key, value in request.items():
            if key in self.cameras or key in self.features.cameras:
                given[key] = value
            elif isinstance(key, str) and key not in _STATE:
                prefix = next((each for each in _CAMERA_PREFIXES if key.startswith(each)), None)
                if prefix is not None:
                    given[key.removeprefix(prefix)] = value
        named = {self.cameras.get(name, name): value for name, value in given.items()}
        return {camera: _image(camera, named[camera]) for camera in self.features.cameras if camera in named}

    def _state(self, request: Mapping[Any, Any]) -> Float32[np.ndarray, " d_state"]:
        width = self.features.d_state
        if not width:
            return np.zeros(0, np.float32)
        key = _first(request, _STATE)
        if key is None:
            raise ValueError(f"no state: expected one of {list(_STATE)}, the request has {sorted(map(str, request))}")
        state = np.asarray(request[key])
        if state.dtype.kind not in "iuf":
            raise TypeError(f"{key!r} must be numbers, got {state.dtype}")
        if state.shape != (width,):
            raise ValueError(f"{key!r} must be [{width}], got {list(state.shape)}")
        if not np.isfinite(state).all():
            raise ValueError(f"{key!r} has NaN or infinite values")
        return state.astype(np.float32)

    def _instruction(self, request: Mapping[Any, Any]) -> str:
        key = _first(request, _INSTRUCTION)
        if key is None:
            # a policy without a text encoder reads none
            if self.instruction is not None or not self.features.max_text:
                return self.instruction or ""
            raise ValueError(
                f"no instruction: expected one of {list(_INSTRUCTION)}, the request has {sorted(map(str, request))}"
            )
        if not isinstance(request[key], str):
            raise TypeError(f"{key!r} must be a string, got {type(request[key]).__name__}")
        return request[key]


def read_whole_number(request: Mapping[Any, Any], key: str) -> int | None:
    """An optional number 0, 1, 2, ... of a request; None where it has none.

    Raises TypeError or ValueError for anything else.
    """
    value = request.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{key!r} must be a whole number, got {value!r}")
    if not 0 <= value < 2**63:
        raise ValueError(f"{key!r} must be in 0..2^63 - 1, got {value}")
    return int(value)


def _first(request: Mapping[Any, Any], keys: Sequence[str]) -> str | None:
    return next((key for key in keys if key in request), None)


def _image(camera: str, value: Any) -> UInt8[np.ndarray, "height width 3"]:
    image = np.asarray(value)
    if image.dtype != np.uint8:
        raise TypeError(f"camera {camera!r}: images are uint8 in 0..255, got {image.dtype}")
    # openpi's ALOHA client sends channels first
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[-1] != 3:
        image = image.transpose(1, 2, 0)
    if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(f"camera {camera!r}: an image is [height, width, 3], got {list(image.shape)}")
    return np.ascontiguousarray(image)
