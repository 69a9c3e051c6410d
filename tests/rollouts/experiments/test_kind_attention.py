"""E13: masks lie on the objects, planted maps score as they should, and a tiny run leaves what it promises."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from report_numbers import unknown_numbers

from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.definition import find_experiment
from hooked_vla.rollouts.experiments.kinds.attention import (
    LAST,
    TOP,
    Settings,
    _knocked_out,
    head_table,
    knock_outs,
    last_layers,
    map_table,
    top_heads,
)
from hooked_vla.rollouts.experiments.kinds.attention_figures import draw_maps
from hooked_vla.rollouts.experiments.kinds.attention_maps import (
    APPROACH,
    CARRY,
    Maps,
    make_maps,
    moments,
    score_table,
    step_table,
)
from hooked_vla.rollouts.experiments.run import run_experiment
from hooked_vla.rollouts.jobs import ModelSource
from hooked_vla.rollouts.settings import Options
from hooked_vla.rollouts.tabletop.scene import BLOCKS, PADS
from hooked_vla.rollouts.video import read_film

MODEL = "smolvla-tabletop"


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> Context:
    return Context(find_experiment("E13"), ModelSource(MODEL), tmp_path_factory.mktemp("attention"))


@pytest.fixture(scope="module")
def found(context):
    return moments(context, "goal", 4)


@pytest.fixture(scope="module")
def maps(context, found) -> Maps:
    return make_maps(context, found)


def _planted(maps: Maps, camera: str, sharp: bool) -> Maps:
    """All heads look at nothing but the target's cells, or evenly everywhere."""
    view, weights = maps.views[camera], {}
    for key, each in maps.weights.items():
        if key[2] == camera:
            new = torch.ones_like(each)
            for i, moment in enumerate(maps.moments if sharp else ()):
                new[i] = torch.from_numpy(view.counts(moment.masks[camera][moment.target]) > 0).float()
            weights[key] = new
    return replace(maps, weights=weights)


def test_masks_lie_on_the_objects(found):
    assert [each.phase for each in found] == [APPROACH, CARRY] * 4
    for moment in found:
        pad = moment.target.startswith("pad_")
        name = moment.target.removeprefix("pad_")
        assert pad == (moment.phase == CARRY) and name == moment.word and name in moment.instruction
        shown = moment.images["top"][moment.masks["top"][moment.target]].astype(float)
        rgb = np.array((PADS if pad else BLOCKS)[name].rgb)
        assert len(shown) > 30
        # lit from above: brightness differs, colour does not
        assert np.corrcoef(np.median(shown, axis=0), rgb)[0, 1] > 0.98
        assert set(moment.others) == {f"pad_{each}" if pad else each for each in (PADS if pad else BLOCKS)} - {
            moment.target
        }


def test_maps_are_of_every_reader_site_and_camera(maps):
    names = [reader.name for reader in maps.readers]
    assert names == ["vlm: words", "vlm: target word", "expert: actions"]
    assert len(maps.weights) == (4 + 4 + 4) * 2
    for (_, site, camera), weights in maps.weights.items():
        steps = 10 if site.startswith("expert.") else 1
        assert weights.shape == (8, steps, 4, *maps.views[camera].grid)


@pytest.mark.parametrize("sharp", [True, False])
def test_planted_maps_score_as_they_should(context, maps, sharp):
    table = score_table(context, _planted(maps, "top", sharp))
    assert set(table["camera"]) == {"top"} and set(table["head"]) == {-1, 0, 1, 2, 3}
    if not sharp:
        assert np.allclose(table["target"], 1) and np.allclose(table["shuffled"], 1)
        return
    assert (table["target"] > 3).all() and (table["hit"] == 1).all()
    assert table["target"].mean() > 1.5 * table["shuffled"].mean() and (table["chance"] < 0.5).all()
    steps = step_table(_planted(maps, "top", sharp), {"one": ("expert: actions", maps.readers[-1].sites[0], 2)}, "top")
    assert list(steps["denoise_step"]) == list(range(10)) and (steps["target"] > 3).all()


def _scores() -> list[dict]:
    """Two pathways; in the expert, head 1 of layer 2 points best, and on scenes for judging only, head 0 of layer 0."""
    rows = []
    for seed in range(8):
        for way, site, live, head, target in (
            ("vlm", "vlm.blocks.1.attn.hook_pattern", True, 0, 1.2),
            ("vlm", "vlm.blocks.2.attn.hook_pattern", False, 0, 9.0),
            ("vlm", "vlm.blocks.2.attn.hook_pattern", False, -1, 1.0),
            ("expert", "expert.blocks.0.attn.hook_pattern", True, 0, 2.0 + 50 * (seed % 2)),
            ("expert", "expert.blocks.2.attn.hook_pattern", True, 1, 5.0),
            ("expert", "expert.blocks.2.attn.hook_pattern", True, -1, 3.0),
        ):
            reader = "vlm: target word" if way == "vlm" else "expert: actions"
            rows.append(
                {"task": "ab"[seed // 2 % 2], "seed": seed, "phase": APPROACH, "camera": "top", "reader": reader,
                 "pathway": way, "site": site, "layer": int(site.split(".")[2]), "head": head, "reaches_action": live,
                 "target": target, "shuffled": 1.0, "other": 1.0, "hit": 1.0, "chance": 0.2}
            )  # fmt: skip
    return rows


def test_heads_are_chosen_on_other_scenes_than_they_are_judged_on():
    tops = top_heads(_scores())
    assert [(each.label, each.what) for each in tops] == [("expert L2H1", TOP), ("vlm L1H0", TOP)]
    table = map_table(_scores(), tops, seed=0)
    first = table[(table["where"] == "expert L2H1") & (table["phase"] == "both")].iloc[0]
    assert first["n"] == 4 and first["target"] == 5.0 and first["more"] == 4.0


def test_the_map_that_is_usually_shown_is_the_last_layers_even_where_it_is_a_dead_end():
    lasts = last_layers(_scores())
    assert [(each.label, each.what, each.head) for each in lasts] == [("vlm L2", LAST, -1), ("expert L2", LAST, -1)]
    table = map_table(_scores(), lasts, seed=0)
    assert list(table["reaches_action"]) == [False, False, True, True]
    assert len(head_table(_scores())) == 4


def test_controls_are_other_heads_of_the_same_pathway(context):
    settings = Settings("goal", "object", 4, "top", 1, n_random=2, n_joint=2, films=0)
    arms = knock_outs(context, _scores(), top_heads(_scores()), settings)
    heads = {arm.name: [(edit.where.sites[0], edit.where.heads) for edit in arm.edits] for arm in arms}
    assert heads["expert: top head"] == [("expert.blocks.2.attn.hook_z", (1,))]
    assert heads["vlm: top head"] == [("vlm.blocks.1.attn.hook_z", (0,))]
    for name, places in heads.items():
        assert all(site.startswith(name.split(":")[0]) for site, _ in places)
        if "random head" in name:
            assert places != heads[f"{name.split(':')[0]}: top head"]


def test_another_suite_or_camera_is_refused(context, tmp_path):
    with pytest.raises(ValueError, match="masks of objects are known in the tabletop's suites"):
        moments(context, "pusht", 2)
    definition = replace(find_experiment("E13"), quick={"scenes": 2, "episodes": 1, "camera": "agent"})
    with pytest.raises(ValueError, match=r"sees the cameras \['top', 'wrist'\], not 'agent'"):
        run_experiment(definition, tmp_path, MODEL, quick=True)


def test_a_tiny_run_leaves_maps_verdicts_and_a_film(tmp_path):
    quick = {"scenes": 4, "episodes": 2, "n_random": 1, "n_joint": 0, "films": 1}
    definition, options = replace(find_experiment("E13"), quick=quick), Options(max_steps=4)
    outcome = run_experiment(definition, tmp_path, MODEL, quick=True, options=options)
    assert [each.rule for each in outcome.verdicts] == ["last-layer", "top-head", "knock-out"]
    # four steps are too few to succeed in
    assert outcome.verdicts[2].holds is None and "floor effect" in outcome.verdicts[2].measured
    assert set(outcome.main["map"]) == {LAST, TOP} and not outcome.main["reaches_action"].all()
    arms = list(outcome.tables["knock_out"]["arm"])
    assert "expert: top head" in arms and "vlm: random head 1" in arms and "rerun" in arms
    assert {"maps", "heads_expert__actions"} <= set(outcome.figures)
    (film,) = (tmp_path / "recordings" / "films").glob("*.mp4")
    frames = read_film(film)
    assert frames.shape == (4, 3 * 96, 3 * 3 * 96, 3)
    report = (tmp_path / "report.md").read_text()
    assert "reaches no action" in report and "dead end" in report
    assert unknown_numbers(tmp_path, definition) == []


def _knocked(context, **row: float) -> dict:
    table = pd.DataFrame([
        {"suite": "goal", "arm": "baseline", "success": 1.0},
        {"suite": "goal", "arm": "expert: top head", "heads": "L0H0", "difference": 0.0, "mcnemar_p": 1.0,
         "holm_p": 1.0, "displacement": 0.02, "floor": 1e-8, "zero_effect": False, "success": 1.0, **row},
    ])  # fmt: skip
    found = _knocked_out(context, table, "goal")
    return {"holds": found.holds, "measured": found.measured}


def test_success_that_stays_is_not_called_no_effect(context):
    found = _knocked(context, difference_low=-0.09, difference_high=0.09)
    assert found["holds"] is True and "20.0 mm (rerun 0.0" in found["measured"]
    assert "is an effect, by being over twice the rerun's floor alone" in found["measured"]
    assert _knocked(context, difference_low=-0.12, difference_high=0.05)["holds"] is None
    assert _knocked(context, difference_low=-0.4, difference_high=-0.2)["holds"] is False


def test_the_best_head_of_all_is_judged_and_others_are_said_to_be_beside_it(context):
    about = {"suite": "goal", "heads": "L0H0", "mcnemar_p": 1.0, "holm_p": 1.0, "displacement": 0.02, "floor": 1e-8,
             "zero_effect": False, "success": 1.0}  # fmt: skip
    table = pd.DataFrame([
        {"suite": "goal", "arm": "baseline", "success": 1.0},
        {**about, "arm": "vlm: top head", "difference": 0.0, "difference_low": -0.05, "difference_high": 0.05},
        {**about, "arm": "expert: top head", "difference": -0.9, "difference_low": -1.0, "difference_high": -0.8},
    ])  # fmt: skip
    found = _knocked_out(context, table, "goal")
    assert found.holds is True
    assert found.measured.startswith("vlm: top head") and ". Beside it, not judged: expert: top" in found.measured


def test_all_maps_are_drawn_on_one_scale(maps):
    chosen = last_layers(_scores())[1:] + top_heads(_scores())[:1]
    figure, caption = draw_maps(maps, chosen, "top")
    assert maps.moments[0].instruction in figure.get_suptitle()
    wordless, _ = draw_maps(maps, chosen, "top", reads_words=False)
    assert wordless.get_suptitle() == f"task {maps.moments[0].task} (no words are read)"
    assert "one scale for all panels" in caption
    bars = [axes for axes in figure.axes if "mean of the camera" in axes.get_ylabel()]
    assert len(bars) == 1
    low, high = bars[0].get_ylim()
    grids = [maps.weights[each.reader, each.site, "top"][i].mean(0) for each in chosen for i in (0, 1)]
    heads = [grid.mean(0) if each.head < 0 else grid[each.head]
             for grid, each in zip(grids, [each for each in chosen for _ in (0, 1)], strict=True)]  # fmt: skip
    assert (low, high) == pytest.approx((0, min(5.0, max(float((head / head.mean()).max()) for head in heads))))
