import numpy as np

from hooked_vla.rollouts.tabletop import BLOCKS, PADS, TASKS
from hooked_vla.training.language import paraphrase, prompt_variants, vocabulary, word_tokenizer

INSTRUCTIONS = sorted({task.instruction for tasks in TASKS.values() for task in tasks})


def test_every_word_that_is_said_is_known():
    rng, tokenizer = np.random.default_rng(0), word_tokenizer(vocabulary())
    for instruction in INSTRUCTIONS:
        for text in {instruction, *(paraphrase(instruction, rng) for _ in range(40))}:
            ids = tokenizer(f"{text}\n")["input_ids"]
            assert tokenizer.unk_token_id not in ids, text
            assert len(ids) == len(text.split()) + 1
    assert tokenizer("Zebra!")["input_ids"] == [tokenizer.unk_token_id] * 2
    assert tokenizer("PUT")["input_ids"] == tokenizer("put")["input_ids"]


def test_other_words_mean_the_same():
    rng = np.random.default_rng(1)
    for instruction in INSTRUCTIONS:
        said = [word for word in instruction.split() if word in {*BLOCKS, *PADS, "left", "middle", "right", "slowly"}]
        texts = {paraphrase(instruction, rng) for _ in range(60)}
        assert len(texts) > 5
        for text in texts:
            assert sorted(said) == sorted(word for word in text.split() if word in said)


def test_shares_of_prompts():
    variants = prompt_variants(INSTRUCTIONS[0], 4000, np.random.default_rng(2), share=0.5, dropped=0.1)
    empty = sum(text == "" for text in variants)
    assert 300 < empty < 500
    assert sum(text == INSTRUCTIONS[0] for text in variants) < 0.65 * 4000


def test_words_keep_their_ids_when_more_are_added():
    words = vocabulary()
    assert vocabulary(("0", "1"))[: len(words)] == words and len(set(words)) == len(words)
