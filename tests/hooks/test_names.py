"""Filters: what each form selects, and what a wrong one says."""

import re

import pytest

from hooked_vla.hooks import names

NAMES = [f"vlm.blocks.{i}.{leaf}" for i in range(3) for leaf in ("hook_resid_pre", "hook_resid_post", "attn.hook_q")]


def test_every_form_of_filter_selects_in_model_order() -> None:
    assert names.resolve(None, NAMES) == NAMES
    assert names.resolve("vlm.blocks.1.attn.hook_q", NAMES) == ["vlm.blocks.1.attn.hook_q"]
    posts = [f"vlm.blocks.{i}.hook_resid_post" for i in range(3)]
    assert names.resolve("vlm.blocks.*.hook_resid_post", NAMES) == posts
    assert names.resolve(re.compile(r".*resid_post"), NAMES) == posts
    assert names.resolve(lambda name: name.endswith("post"), NAMES) == posts
    for sequence in (list, tuple, iter):
        assert names.resolve(sequence([posts[2], re.compile(r".*0.*post"), posts[1]]), NAMES) == posts
    assert names.resolve([], NAMES) == []


@pytest.mark.parametrize("wrap", [lambda name: name, lambda name: ["vlm.blocks.0.attn.hook_q", name]])
def test_an_unknown_name_is_an_error_with_the_three_nearest_even_in_a_sequence(wrap) -> None:
    with pytest.raises(KeyError, match=r"vlm.blocks.1.hook_resid_pst.*nearest: vlm.blocks.1.hook_resid_post") as error:
        names.resolve(wrap("vlm.blocks.1.hook_resid_pst"), NAMES)
    assert str(error.value).count("vlm.blocks.") == 4


def test_filters_that_select_nothing_are_errors() -> None:
    with pytest.raises(KeyError, match="selects none"):
        names.resolve(lambda name: False, NAMES)
    with pytest.raises(KeyError, match="expert"):
        names.resolve("expert.*", NAMES)
    with pytest.raises(KeyError, match="resid_mid"):
        names.resolve(re.compile("resid_mid"), NAMES)
    with pytest.raises(TypeError, match="int"):
        names.resolve(3, NAMES)  # pyright: ignore


def test_names_outside_the_vocabulary_have_no_meaning() -> None:
    assert names.meaning("expert.blocks.1.cross_attn.hook_prefix_k")
    for wrong in ("llm.blocks.0.hook_q", "vlm.blocks.0.hook_query", "vlm.nonsense.0.hook_q"):
        with pytest.raises(KeyError, match="vocabulary"):
            names.meaning(wrong)
