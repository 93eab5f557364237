"""Determines where a response ends, and its text, in the same way for engines, verifiers, environments and evaluations.

    endings = Endings.of(tokenizer, "outputs/demo/model", ["\\nQuestion:"])
    endings.text(token_ids)                                  # the text up to the end, without what ended it
    endings.length(token_ids)                                # number of tokens up to the end, including what ended it

A response keeps the tokens that ended it, since they are actions that the policy chose. Its text, which verifiers and
environments read, does not contain them.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>", "<|end|>")
_PLACEHOLDER = "COLA"


@dataclass(frozen=True)
class Endings:
    """A checkpoint's end tokens, and stop strings.

    Args:
        tokenizer: of the checkpoint.
        token_ids: ids that each end a response.
        strings: each ends a response as soon as the text contains it.
    """

    tokenizer: "PreTrainedTokenizerBase"
    token_ids: tuple[int, ...]
    strings: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", model_path: str, strings: Iterable[str] = ()) -> "Endings":
        return cls(tokenizer, end_token_ids(tokenizer, model_path), tuple(dict.fromkeys(strings)))

    def text(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of a response up to its first end.

        Other control tokens stay in it: ``<think>`` is one in some vocabularies, and verifiers look for it. Only
        padding and BOS are removed.
        """
        said = [int(token) for token in token_ids]
        end = next((place for place, token in enumerate(said) if token in self.token_ids), len(said))
        text = self._decode(said[:end])
        return text[: min((place for place in map(text.find, self.strings) if place >= 0), default=len(text))]

    def length(self, token_ids: Sequence[int] | np.ndarray) -> int | None:
        """Return the number of tokens up to and including the first end; None if the response has not ended."""
        said = [int(token) for token in token_ids]
        end = next((place for place, token in enumerate(said) if token in self.token_ids), None)
        within = said if end is None else said[:end]
        if not self._holds_a_string(within):
            return None if end is None else end + 1
        low, high = 1, len(within)  # bisect: the first ``high`` tokens contain a stop string
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._holds_a_string(within[:middle]) else (middle + 1, high)
        return high

    def _holds_a_string(self, said: list[int]) -> bool:
        return bool(self.strings) and any(string in self._decode(said) for string in self.strings)

    def _decode(self, said: list[int]) -> str:
        silent = {self.tokenizer.pad_token_id, self.tokenizer.bos_token_id}
        kept = [token for token in said if token not in silent]
        return str(self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def end_token_ids(tokenizer: "PreTrainedTokenizerBase", model_path: str | os.PathLike) -> tuple[int, ...]:
    """Return all tokens that end a response of a checkpoint, the tokenizer's own first.

    They come from its ``generation_config.json`` and ``config.json`` (a number or a list), from the token that its chat
    template puts after an answer, and from the end-of-turn tokens of common vocabularies. A number that is not a
    control token of this vocabulary is a leftover default and is ignored.
    """
    known = (tokenizer.convert_tokens_to_ids(token) for token in _END_OF_TURN)
    named = (tokenizer.eos_token_id, *_from_configs(model_path), _from_template(tokenizer), *known)
    control = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.unk_token_id}
    control |= {tokenizer.eos_token_id}
    return tuple(dict.fromkeys(int(token) for token in named if token is not None and token in control))


def _from_configs(model_path: str | os.PathLike) -> list[int]:
    """Read the end tokens from the checkpoint's files; a config object would add its class's defaults."""
    from transformers.utils import cached_file

    found: list[Any] = []
    for name in ("generation_config.json", "config.json"):
        file = cached_file(str(model_path), name, _raise_exceptions_for_missing_entries=False)
        said = json.loads(Path(file).read_text()).get("eos_token_id") if file else None
        found += said if isinstance(said, list) else [said]
    return [token for token in found if isinstance(token, int)]


def _from_template(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the first control token after an answer in a conversation rendered by the chat template."""
    if not tokenizer.chat_template:
        return None
    try:
        messages = [{"role": "user", "content": _PLACEHOLDER}, {"role": "assistant", "content": _PLACEHOLDER}]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template may refuse any conversation; the other sources remain
        return None
    behind = tokenizer(text.rpartition(_PLACEHOLDER)[2], add_special_tokens=False)["input_ids"]
    control = {*tokenizer.all_special_ids} - {tokenizer.bos_token_id, tokenizer.unk_token_id}
    return next((token for token in behind if token in control), None)
