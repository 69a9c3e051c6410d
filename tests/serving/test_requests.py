"""The spellings that clients use, and errors that name what is wrong."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hooked_vla import get_spec
from hooked_vla.serving.requests import RequestReader, read_whole_number

FEATURES = get_spec("smolvla", "tiny").features
IMAGE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
STATE = np.arange(4.0)


def request(**changes: Any) -> dict[str, Any]:
    made = {"images": {"agent": IMAGE, "wrist": IMAGE + 1}, "state": STATE, "prompt": "lift"} | changes
    return {key: value for key, value in made.items() if value is not None}


@pytest.mark.parametrize(
    ("sent", "cameras"),
    [
        (request(), {}),
        ({"images": {"agent": IMAGE, "wrist": IMAGE + 1}, "task_description": "lift", "state": STATE}, {}),
        (
            {"observation/agent": IMAGE, "observation/wrist": IMAGE + 1, "observation/state": STATE, "prompt": "lift"},
            {},
        ),
        (
            {"observation.images.agent": IMAGE, "observation.images.wrist": IMAGE + 1, "observation.state": STATE,
             "task": "lift"}, {},
        ),
        (
            {"observation/image": IMAGE, "observation/wrist_image": IMAGE + 1, "observation/state": STATE,
             "prompt": "lift"}, {"observation/image": "agent", "wrist_image": "wrist"},
        ),
        ({"images": {"cam_high": IMAGE, "wrist": IMAGE + 1}, "state": STATE, "prompt": "lift"}, {"cam_high": "agent"}),
    ],
)  # fmt: skip
def test_every_spelling_is_the_same_observation(sent, cameras):
    obs = RequestReader(FEATURES, cameras)(sent)
    assert list(obs.images) == ["agent", "wrist"]
    assert np.array_equal(obs.images["agent"], IMAGE) and np.array_equal(obs.images["wrist"], IMAGE + 1)
    assert obs.state.dtype == np.float32 and np.array_equal(obs.state, STATE)
    assert obs.instruction == "lift"


def test_channels_first_images_are_turned():
    obs = RequestReader(FEATURES)(request(images={"agent": IMAGE.transpose(2, 0, 1), "wrist": IMAGE}))
    assert np.array_equal(obs.images["agent"], IMAGE)


def test_other_cameras_and_entries_are_left_out():
    obs = RequestReader(FEATURES)(request(images={"agent": IMAGE, "wrist": IMAGE, "back": IMAGE}, extra=1))
    assert list(obs.images) == ["agent", "wrist"]


def test_a_camera_known_by_its_whole_key():
    features = replace(FEATURES, cameras=("observation.image",))
    obs = RequestReader(features)({"observation.image": IMAGE, "state": STATE, "prompt": "lift"})
    assert list(obs.images) == ["observation.image"]


def test_what_the_policy_does_not_read_need_not_be_sent():
    plain = RequestReader(replace(FEATURES, d_state=0, max_text=0))({"images": {"agent": IMAGE, "wrist": IMAGE}})
    assert plain.state.shape == (0,) and plain.instruction == ""
    assert RequestReader(FEATURES, instruction="push")(request(prompt=None)).instruction == "push"
    assert RequestReader(FEATURES, instruction="push")(request()).instruction == "lift"
    one = RequestReader(replace(FEATURES, empty_cameras=1))(request(images={"wrist": IMAGE}))
    assert list(one.images) == ["wrist"]


@pytest.mark.parametrize(
    ("sent", "error", "message"),
    [
        ([1], TypeError, "a request is a map of observations, got list"),
        (request(images=None), ValueError, r"no image for the cameras \['agent', 'wrist'\].*\['prompt', 'state'\]"),
        (request(images={"agent": IMAGE}), ValueError, r"no image for the cameras \['wrist'\].*shows \['agent'\]"),
        (request(images=[IMAGE]), TypeError, "'images' is a map from camera to image, got list"),
        (
            request(images={"agent": IMAGE / 255, "wrist": IMAGE}),
            TypeError,
            "camera 'agent': images are uint8.*float64",
        ),
        (request(images={"agent": IMAGE, "wrist": IMAGE[..., :2]}), ValueError, r"camera 'wrist'.*got \[4, 5, 2\]"),
        (request(images={"agent": IMAGE[None], "wrist": IMAGE}), ValueError, r"camera 'agent'.*got \[1, 4, 5, 3\]"),
        (request(images={"agent": IMAGE[:0], "wrist": IMAGE}), ValueError, r"camera 'agent'.*got \[0, 5, 3\]"),
        (request(images={"agent": "text", "wrist": IMAGE}), TypeError, "camera 'agent': images are uint8"),
        (request(state=None), ValueError, "no state: expected one of .*'observation/state'"),
        (request(state=np.zeros(5)), ValueError, r"'state' must be \[4\], got \[5\]"),
        (request(state=np.zeros((1, 4))), ValueError, r"'state' must be \[4\], got \[1, 4\]"),
        (request(state=np.array([0, 1, 2, np.nan])), ValueError, "'state' has NaN or infinite values"),
        (request(state="text"), TypeError, "'state' must be numbers"),
        (request(prompt=None), ValueError, "no instruction: expected one of .*'task_description'"),
        (request(prompt=3), TypeError, "'prompt' must be a string, got int"),
    ],
)
def test_errors_name_the_entry(sent, error, message):
    with pytest.raises(error, match=message):
        RequestReader(FEATURES)(sent)


def test_a_camera_map_to_unknown_cameras_is_refused():
    with pytest.raises(ValueError, match=r"no cameras \['top'\]; its cameras: \['agent', 'wrist'\]"):
        RequestReader(FEATURES, {"image": "top"})


def test_whole_numbers():
    assert read_whole_number({}, "seed") is None
    assert read_whole_number({"seed": np.int64(7)}, "seed") == 7
    for wrong, error in (("7", TypeError), (1.0, TypeError), (True, TypeError), (-1, ValueError), (2**63, ValueError)):
        with pytest.raises(error, match="'seed' must be"):
            read_whole_number({"seed": wrong}, "seed")
