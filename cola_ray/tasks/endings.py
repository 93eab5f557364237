"""What ends a response, and its text: the same for engines, verifiers, environments and evaluations.

    endings = Endings.of(tokenizer, "outputs/demo/model", ["\\nQuestion:"])
    endings.text(token_ids)                                  # what was said, without what ended it
    endings.length(token_ids)                                # tokens up to the end, what ended it included

A response keeps the tokens that ended it: they are actions that the policy chose. Its text, which verifiers and
environments read, does not.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

_ENDS_A_TURN = ("<|eot_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>", "<|end|>")
_MARK = "COLA"


@dataclass(frozen=True)
class Endings:
    """A checkpoint's end tokens, and strings.

    Args:
        token_ids: each ends a response.
        strings: each ends a response as soon as its text holds it.
    """

    tokenizer: PreTrainedTokenizerBase
    token_ids: tuple[int, ...]
    strings: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, model_path: str, strings: Iterable[str] = ()) -> "Endings":
        return cls(tokenizer, end_token_ids(tokenizer, model_path), tuple(dict.fromkeys(strings)))

    def text(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """What a response says up to its first end.

        Other control tokens stay: ``<think>`` is one in some vocabularies, and verifiers look for it. Only padding and
        the token that texts begin with are left out.
        """
        said = [int(token) for token in token_ids]
        end = next((place for place, token in enumerate(said) if token in self.token_ids), len(said))
        text = self._decode(said[:end])
        return text[: min((place for place in map(text.find, self.strings) if place >= 0), default=len(text))]

    def length(self, token_ids: Sequence[int] | np.ndarray) -> int | None:
        """How many tokens there are up to the first end, with those that make it; None where nothing has ended."""
        said = [int(token) for token in token_ids]
        end = next((place for place, token in enumerate(said) if token in self.token_ids), None)
        within = said if end is None else said[:end]
        if not self._holds_a_string(within):
            return None if end is None else end + 1
        low, high = 1, len(within)  # the first ``high`` tokens hold one
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


def end_token_ids(tokenizer: PreTrainedTokenizerBase, model_path: str | os.PathLike) -> tuple[int, ...]:
    """All tokens that end a response of a checkpoint, the tokenizer's own first.

    Those of its ``generation_config.json`` and ``config.json`` (a number or a list), the one that its chat template
    puts behind an answer, and those of that purpose in common vocabularies. A number that is no control token in this
    vocabulary is a leftover default and does not count.
    """
    known = (tokenizer.convert_tokens_to_ids(token) for token in _ENDS_A_TURN)
    named = (tokenizer.eos_token_id, *_of_configs(model_path), _of_template(tokenizer), *known)
    control = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.unk_token_id}
    control |= {tokenizer.eos_token_id}
    return tuple(dict.fromkeys(int(token) for token in named if token is not None and token in control))


def _of_configs(model_path: str | os.PathLike) -> list[int]:
    """What the checkpoint's files say, as they say it: a config object would add its class's defaults."""
    found: list[Any] = []
    for name in ("generation_config.json", "config.json"):
        file = cached_file(str(model_path), name, _raise_exceptions_for_missing_entries=False)
        said = json.loads(Path(file).read_text()).get("eos_token_id") if file else None
        found += said if isinstance(said, list) else [said]
    return [token for token in found if isinstance(token, int)]


def _of_template(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first control token behind an answer, in a conversation that the chat template writes."""
    if not tokenizer.chat_template:
        return None
    try:
        messages = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template may refuse any conversation; the other sources remain
        return None
    behind = tokenizer(text.rpartition(_MARK)[2], add_special_tokens=False)["input_ids"]
    control = {*tokenizer.all_special_ids} - {tokenizer.bos_token_id, tokenizer.unk_token_id}
    return next((token for token in behind if token in control), None)
