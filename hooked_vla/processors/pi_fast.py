"""π0-FAST: from the ids of action tokens to actions, by the FAST tokenizer that the checkpoint brings or names.

FAST (arXiv 2501.09747): each action dimension's chunk in cosine coefficients, rounded, written as characters, packed
by byte-pair encoding. A batch that came preprocessed gets the token ids themselves as its chunk, [batch token 1],
where no FAST tokenizer is within reach: so the model can be studied without one.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import file_exists, hf_hub_download
from jaxtyping import Float
from torch import Tensor

from hooked_vla import lerobot
from hooked_vla.processors.pi import PiProcessor
from hooked_vla.spec import FastSpec

logger = logging.getLogger(__name__)

_SETTINGS = "processor_config.json"


class FastTokenizer:
    """FAST token ids to actions; `scale` and `min_token` are the packing's.

    decode: ids to text; each character stands for the coefficient ord(character) + min_token, in units of 1 / scale.
    """

    def __init__(self, decode: Any, min_token: int, scale: float) -> None:
        self._decode, self.min_token, self.scale = decode, min_token, scale

    @classmethod
    def from_files(cls, name: str, folder: Path | None) -> "FastTokenizer":
        """The tokenizer in the checkpoint's folder, or from the hub; "bytes": a coefficient a token, its id modulo 256.

        Raises OSError saying where it was looked for.
        """
        if name == "bytes":
            return cls(lambda ids: "".join(chr(i % 256) for i in ids), min_token=-128, scale=10.0)
        from transformers import PreTrainedTokenizerFast

        places = [] if folder is None else [folder / name, folder / name.rpartition("/")[2]]
        local = [place for place in places if (place / _SETTINGS).is_file()]
        try:
            settings = json.loads(Path(local[0] / _SETTINGS if local else _from_hub(name)).read_text())
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(local[0]) if local else name)
        except (OSError, ValueError) as error:
            raise OSError(
                f"no action tokenizer in {[str(place) for place in places]} and none from the hub under {name!r}; "
                "put its files beside config.json, or ask for the token ids: generate_action_tokens"
            ) from error
        return cls(tokenizer.decode, settings["min_token"], settings["scale"])

    def actions(self, ids: Sequence[int], n_steps: int, d_action: int) -> Float[Tensor, "step d_action"]:
        """One row's chunk; missing coefficients are 0 and surplus ones dropped.

        Tokens that are no action tokens give actions of 0, with a warning, as in LeRobot.
        """
        try:
            text = self._decode(list(ids))
        except (OverflowError, TypeError) as error:
            logger.warning("generated tokens are no action tokens (%s), their actions are 0: %s", error, list(ids))
            text = ""
        coefficients = [ord(character) + self.min_token for character in text][: n_steps * d_action]
        coefficients += [0] * (n_steps * d_action - len(coefficients))
        spectrum = torch.tensor(coefficients, dtype=torch.float64).reshape(n_steps, d_action) / self.scale
        return (inverse_cosines(n_steps) @ spectrum).float()


def inverse_cosines(n: int) -> Float[Tensor, "n n"]:
    """The orthonormal inverse discrete cosine transform (DCT-III) of length n as a matrix."""
    step, frequency = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)[None]
    waves = (math.pi * (2 * step + 1) * frequency / (2 * n)).cos() * math.sqrt(2 / n)
    waves[:, 0] = math.sqrt(1 / n)
    return waves


def _from_hub(name: str) -> str:
    try:
        file_exists(name, _SETTINGS)
        reachable = True
    except Exception:  # which error a lost connection raises depends on the hub client's version
        reachable = False
    # the client asks an unreachable hub for most of a minute
    return hf_hub_download(name, _SETTINGS, local_files_only=not reachable)


class FastProcessor(PiProcessor):
    """As LeRobot's pi0_fast: the prompt tells the state, generated tokens become a chunk of n_action_steps steps."""

    fast: FastSpec
    folder: Path | None
    _action_tokenizer: FastTokenizer | None
    _told: bool

    @classmethod
    def from_files(
        cls,
        spec: Any,
        folder: Path | None,
        files: Mapping[str, bytes],
        statistics: Mapping[str, Mapping[str, Tensor]],
    ) -> "FastProcessor":
        processor = super().from_files(spec, folder, files, statistics)
        assert isinstance(processor, FastProcessor)
        processor.fast, processor.folder = spec.fast, folder
        processor._action_tokenizer, processor._told = None, False
        return processor

    @staticmethod
    def state_width(spec: Any) -> int:
        return spec.d_state

    def actions(self, padded: Float[Tensor, "batch token 1"], raw: bool) -> tuple[Tensor, Tensor]:
        """The chunk in the robot's units (or normalised, for a batch that came preprocessed), and normalised.

        Raises ValueError for tokens that do not start as actions must, OSError without a FAST tokenizer; but a batch
        that came preprocessed then gets the token ids.
        """
        try:
            action_tokenizer, text_tokenizer = self.action_tokenizer(), self.tokenizer.load()
        except OSError as error:
            if raw:
                raise
            if not self._told:
                logger.warning("the chunk will be the ids of the generated tokens: %s", error)
                self._told = True
            return padded, padded
        prefix = text_tokenizer.encode(self.fast.prefix, add_special_tokens=False)
        end = text_tokenizer.convert_tokens_to_ids("|")
        n_steps, d_action = self.features.n_action_steps, self.features.d_action
        rows = [self._action_ids(row, prefix, end) for row in padded[..., 0].long().tolist()]
        chunk = torch.stack([action_tokenizer.actions(row, n_steps, d_action) for row in rows]).to(padded.device)
        return (self.normalizer.inverse(lerobot.ACTION, chunk) if raw else chunk), chunk

    def action_tokenizer(self) -> FastTokenizer:
        """The FAST tokenizer, loaded on first use.

        Raises OSError where there is none.
        """
        if self._action_tokenizer is None:
            self._action_tokenizer = FastTokenizer.from_files(self.fast.tokenizer, self.folder)
        return self._action_tokenizer

    def _action_ids(self, tokens: list[int], prefix: list[int], end: int) -> list[int]:
        """FAST ids of one row: without the prefix, wherever it stands, and without what follows the end."""
        if self.fast.required and tokens[: len(prefix[:2])] != prefix[:2]:
            raise ValueError(
                f"generated tokens {tokens[:5]} do not start with {self.fast.prefix!r}; `generate_action_tokens` gives "
                "them as they are, and config.json's validate_action_token_prefix=false accepts them"
            )
        tokens = tokens[: tokens.index(end)] if end in tokens else tokens
        start = 0
        while start <= len(tokens) - len(prefix):
            if tokens[start : start + len(prefix)] == prefix:
                tokens = tokens[:start] + tokens[start + len(prefix) :]
            else:
                start += 1
        # action tokens count down from the vocabulary's end
        return [self.d_vocab - 1 - self.fast.skip - token for token in tokens]


PROCESSOR = FastProcessor
