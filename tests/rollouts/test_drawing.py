import subprocess
import sys

import numpy as np
import pytest

# MuJoCo comes second: it decides how to draw when it is imported
from hooked_vla.rollouts.drawing import QUALITY_VARIABLE, ModelView, mujoco, render_quality

SCENE = """
<mujoco>
  <visual><global offwidth="32" offheight="32"/></visual>
  <worldbody>
    <light pos="0.5 0 2" dir="-0.2 0 -1" castshadow="true"/>
    <camera name="above" pos="0 -1 1.2" xyaxes="1 0 0 0 0.77 0.64"/>
    <geom name="table" type="plane" size="1 1 0.1" rgba="0.8 0.8 0.8 1"/>
    <geom name="box" type="box" size="0.1 0.1 0.1" pos="0 0 0.3" rgba="{rgba}" group="{group}"/>
  </worldbody>
</mujoco>
"""


def scene(rgba: str = "1 0 0 1", group: int = 0) -> tuple[mujoco.MjModel, mujoco.MjData]:
    model = mujoco.MjModel.from_xml_string(SCENE.format(rgba=rgba, group=group))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


def is_red(image: np.ndarray) -> bool:
    image = image.astype(int)
    return bool(((image[..., 0] > 60) & (image[..., 1] < 20)).any())


def test_views_that_take_turns_draw_their_own_scene():
    red, blue = ModelView(*scene(), 24, 24), ModelView(*scene("0 0 1 1"), 40, 40)
    alone_red, alone_blue = red.image("above"), blue.image("above")
    assert is_red(alone_red) and not is_red(alone_blue)
    for _ in range(2):
        assert np.array_equal(red.image("above"), alone_red)
        assert np.array_equal(blue.image("above"), alone_blue)
    red.close()
    assert np.array_equal(blue.image("above"), alone_blue)
    assert np.array_equal(red.image("above"), alone_red)
    red.close()
    blue.close()


def test_image_may_be_larger_than_the_models_buffer():
    view = ModelView(*scene(), 48, 64)
    assert view.image("above").shape == (48, 64, 3)
    view.close()


def test_frames_are_copies():
    model, data = scene()
    view = ModelView(model, data, 24, 24)
    first = view.image("above")
    kept = first.copy()
    data.geom_xpos[1] += 0.2
    assert not np.array_equal(view.image("above"), first)
    assert np.array_equal(first, kept)
    view.close()


def test_fast_leaves_out_shadows_and_leaves_the_model_as_it_was(monkeypatch):
    model, data = scene()
    images = {}
    for quality in ("full", "fast"):
        monkeypatch.setenv(QUALITY_VARIABLE, quality)
        view = ModelView(model, data, 32, 32)
        assert view.quality == quality
        images[quality] = view.image("above")
        view.close()
    assert model.vis.quality.offsamples == 4
    ground = images["fast"][images["fast"][..., 1] > 60]
    assert images["full"].min() < ground.min()
    assert images["full"].mean() < images["fast"].mean()


@pytest.mark.parametrize(("hide", "show", "seen"), [((), (), False), ((), (4,), True), ((4,), (), False)])
def test_groups_are_hidden_and_shown(hide, show, seen):
    view = ModelView(*scene(group=4), 24, 24, hide_groups=hide, show_groups=show)
    assert is_red(view.image("above")) == seen
    view.close()


def test_full_is_the_default_and_another_word_is_refused(monkeypatch):
    monkeypatch.delenv(QUALITY_VARIABLE, raising=False)
    assert render_quality() == "full"
    monkeypatch.setenv(QUALITY_VARIABLE, "pretty")
    with pytest.raises(ValueError, match=r"HOOKED_VLA_RENDER='pretty'.*full.*fast"):
        ModelView(*scene(), 24, 24)


def test_triton_may_be_imported_after_a_frame_was_drawn():
    """Its LLVM and that of software OpenGL do not mix in the other order: the process would end."""
    pytest.importorskip("triton")
    code = (
        "from hooked_vla.rollouts.drawing import ModelView, mujoco as m; "
        "model = m.MjModel.from_xml_string('<mujoco><worldbody><geom size=\".1\"/></worldbody></mujoco>'); "
        "view = ModelView(model, m.MjData(model), 8, 8); view._make().render(); import triton; print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "ok\n", (done.returncode, done.stderr)
