"""The prompt battery: what each kind says, that it is seeded, and what it leaves alone."""

import pytest

from hooked_vla.rollouts.batteries.phrases import Parts, other_parts, take_apart
from hooked_vla.rollouts.batteries.prompts import (
    NO_GOAL,
    OTHER_GOAL,
    PROMPT_KINDS,
    change_prompt,
)
from hooked_vla.rollouts.tabletop import TASKS

GOAL = tuple(task.instruction for task in TASKS["goal"])
TOLD = "put the red block on the orange pad"


def test_there_are_23_kinds_and_all_change_an_instruction_of_the_goal_suite() -> None:
    assert len(PROMPT_KINDS) == 23
    for seed in range(5):
        assert all(change_prompt(kind, TOLD, GOAL, seed) != TOLD for kind in PROMPT_KINDS)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("null", ""),
        ("negation", "do not put the red block on the orange pad"),
        ("opposite", "take the red block from the orange pad"),
        ("stop", "stop"),
        ("left", "move left"),
        ("absent_object", "put the cup on the orange pad"),
        ("paraphrase", "on the orange pad put the red block"),
        ("upper_case", "PUT THE RED BLOCK ON THE ORANGE PAD"),
        ("only_verb", "put"),
        ("only_noun", "red block orange pad"),
        ("filler", "please put the red block on the orange pad now"),
        ("foreign", "lege den roten klotz auf den orangefarbenen platte"),
    ],
)
def test_kinds_without_chance_say_what_they_say(kind: str, said: str) -> None:
    assert {change_prompt(kind, TOLD, GOAL, seed) for seed in range(3)} == {said}


def test_other_goals_are_other_tasks_of_the_suite() -> None:
    kinds = {"wrong_object": 3, "wrong_target": 2, "other_task": 11}
    drawn = {kind: {change_prompt(kind, TOLD, GOAL, seed) for seed in range(60)} for kind in kinds}
    assert all(told <= set(GOAL) - {TOLD} for told in drawn.values())
    assert {kind: len(told) for kind, told in drawn.items()} == kinds
    assert all(told.endswith("on the orange pad") for told in drawn["wrong_object"])
    assert all(told.startswith("put the red block on") for told in drawn["wrong_target"])


def test_chance_follows_the_seed_alone() -> None:
    for kind in PROMPT_KINDS:
        assert change_prompt(kind, TOLD, GOAL, 7) == change_prompt(kind, TOLD, GOAL, 7)
    drawn = ("nonsense", "random_words", "shuffled", "typo", "synonyms", "other_task")
    for kind in drawn:
        assert len({change_prompt(kind, TOLD, GOAL, seed) for seed in range(20)}) > 3, kind


def test_words_stay_the_same_words_where_only_their_order_or_letters_change() -> None:
    for seed in range(10):
        assert sorted(change_prompt("shuffled", TOLD, GOAL, seed).split()) == sorted(TOLD.split())
        typed = change_prompt("typo", TOLD, GOAL, seed).split()
        wrong = [(a, b) for a, b in zip(TOLD.split(), typed, strict=True) if a != b]
        assert len(wrong) == 2 and all(sorted(a) == sorted(b) and a[0] == b[0] for a, b in wrong)
        assert len(change_prompt("nonsense", TOLD, GOAL, seed).split()) == 8
        assert not set(change_prompt("nonsense", TOLD, GOAL, seed).split()) & set(" ".join(GOAL).split())
        assert set(change_prompt("random_words", TOLD, GOAL, seed).split()) <= set(" ".join(GOAL).split())


def test_a_kind_that_does_not_apply_leaves_the_instruction_alone() -> None:
    alone = tuple(task.instruction for task in TASKS["object"])
    assert change_prompt("wrong_target", alone[0], alone, 0) == alone[0]
    assert change_prompt("other_task", "wave", ("wave",), 0) == "wave"
    assert change_prompt("shuffled", "wave", ("wave",), 0) == "wave"
    assert change_prompt("only_verb", "wave", ("wave",), 0) == "wave"
    assert change_prompt("typo", "go", ("go",), 0) == "go"


def test_kinds_without_a_goal_name_none_and_others_name_another() -> None:
    colours = {word for text in GOAL for word in text.split()} - {"put", "the", "block", "on", "pad"}
    for kind, each in PROMPT_KINDS.items():
        said = set(change_prompt(kind, TOLD, GOAL, 1).lower().split())
        if each.effect == NO_GOAL:
            assert not said & colours, kind
        if each.effect == OTHER_GOAL:
            assert not {"red", "orange"} <= said, kind


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown kind 'rude' of prompt; kinds: \['null', 'nonsense'"):
        change_prompt("rude", TOLD, GOAL, 0)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (TOLD, Parts("put", "the red block", "on", "the orange pad")),
        (
            "Pick up the black bowl between the plate and the ramekin and place it on the plate.",
            Parts("pick up", "the black bowl between the plate and the ramekin", "and place it on", "the plate"),
        ),
        ("put the wine bottle on top of the cabinet", Parts("put", "the wine bottle", "on top of", "the cabinet")),
        ("turn on the stove", Parts("turn on", "the stove")),
        ("open the middle drawer of the cabinet", Parts("open", "the middle drawer of the cabinet")),
        ("wave", None),
    ],
)
def test_instructions_of_the_public_suites_come_apart(text: str, parts: Parts | None) -> None:
    assert take_apart(text) == parts
    assert parts is None or str(parts) == " ".join(text.lower().split()).rstrip(".")


def test_other_parts_are_those_of_other_instructions() -> None:
    assert other_parts("target", TOLD, GOAL) == ["the purple pad", "the cyan pad"]
    assert other_parts("object", "wave", ("wave", "open the door")) == ["the door"]
