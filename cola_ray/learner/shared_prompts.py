"""Completions of the same prompt, computed with the prompt once.

    rows (B, T)       p p a a a      packed (1, S)   p p | a a a | b b | q | c        position ids  0 1 2 3 4 2 3 0 1
                      p p b b -
                      q c - - -      attention       a prompt to itself; a response to its prompt and to itself

The states of a prompt are the same in every row that begins with it, and its gradient is the sum over these rows.
Projections, MLPs and norms work token by token, so they read packed rows, which also have no padding. Attention takes
prompts and responses separately (:func:`attention`).
Source: Liu et al. 2025, "Prefix Grouper" (arXiv 2506.05433).

Legend: B rows, T positions, S packed positions, G different prompts of at most P tokens, R responses of at most L.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cola_ray.model.modeling_cola import positions

ATTENTION = "shared_prompts"
"""Name of :func:`attention` among transformers' attention implementations; without shared prompts it is "sdpa"."""


@dataclass(frozen=True)
class SharedPrompts:
    """Where the positions of a micro-batch's rows are in its packed form; int64 unless noted otherwise."""

    tokens: Tensor  # (S,), of each packed position: its place in the flattened rows, b * T + t
    places: Tensor  # (B, T), of each position: its packed place; 0 for padding
    position_ids: Tensor  # (1, S)
    prompts: Tensor  # (G, P), packed places; beyond a prompt's end some other place
    responses: Tensor  # (R, L), packed places; beyond a response's end some other place
    prompt_of: Tensor  # (R,), which of the prompts each response continues
    seen: Tensor  # (R, 1, L, P + L) bool, the positions of prompt and response that a response's position attends to
    restored: (
        Tensor  # (S,), of each packed position: its place in the flattened prompts (G * P), then responses (R * L)
    )

    @classmethod
    def of(cls, prompts: Sequence[Hashable], lengths: Sequence[tuple[int, int]], width: int) -> "SharedPrompts | None":
        """The layout of B rows; None if no two of them have the same prompt.

        Args:
            prompts: of each row, whatever rows with the same prompt have in common, and only those.
            lengths: of each row, the tokens of its prompt and of its response, which may be 0.
            width: T.
        """
        if len({*prompts}) == len(prompts):
            return None
        made: dict[Hashable, int] = {}  # prompts in order
        parts: list[_Part] = []
        of_prompts, of_responses, prompt_of, rows = (
            list[_Part](),
            list[_Part](),
            list[int](),
            list[tuple[_Part, _Part]](),
        )
        for row, (prompt, (first, count)) in enumerate(zip(prompts, lengths, strict=True)):
            if prompt not in made:
                made[prompt] = len(made)
                of_prompts.append(_Part.after(parts, row * width, 0, first))
            own = _Part.after(parts, row * width + first, first, count)
            if count:
                of_responses.append(own)
                prompt_of.append(made[prompt])
            rows.append((of_prompts[made[prompt]], own))
        at_prompts, at_responses = (_table([part.places for part in of]) for of in (of_prompts, of_responses))
        longest, length = at_prompts.shape[1], at_responses.shape[1]
        own_prompt = np.array([len(of_prompts[number].places) for number in prompt_of])
        seen = np.ones((len(of_responses), 1, length, longest + length), bool)
        seen[..., :longest] = (np.arange(longest) < own_prompt[:, None])[:, None, None]
        seen[..., longest:] = np.tri(length, dtype=bool)
        restored = np.zeros(sum(len(part.places) for part in parts), np.int64)
        for first, size, table in ((0, longest, of_prompts), (len(of_prompts) * longest, length, of_responses)):
            for number, part in enumerate(table):
                restored[part.places] = first + number * size + np.arange(len(part.places))
        found = (
            np.concatenate([part.tokens for part in parts]),
            _table([np.concatenate([part.places for part in of_row]) for of_row in rows], width, 0),
            np.concatenate([part.positions for part in parts])[None],
            at_prompts, at_responses, np.array(prompt_of), seen, restored,
        )  # fmt: skip
        return cls(*map(torch.from_numpy, found))

    def to(self, device: torch.device) -> "SharedPrompts":
        return SharedPrompts(**{name: one.to(device) for name, one in vars(self).items()})

    def pack(self, rows: Tensor) -> Tensor:
        """(B, T, ...) -> (1, S, ...); of a shared prompt, the first row's."""
        return rows.flatten(0, 1)[self.tokens][None]

    def unpack(self, packed: Tensor) -> Tensor:
        """(1, S, ...) -> (B, T, ...); padding gets the values of some token."""
        return packed[0][self.places]


class _Part(NamedTuple):
    """A prompt or a response: each token's place in the flattened rows, position id, and packed place."""

    tokens: np.ndarray
    positions: np.ndarray
    places: np.ndarray

    @classmethod
    def after(cls, parts: "list[_Part]", token: int, position: int, count: int) -> "_Part":
        """Put ``count`` tokens behind the parts that there are."""
        start = int(parts[-1].places[-1]) + 1 if parts else 0
        part = cls(*(np.arange(first, first + count) for first in (token, position, start)))
        if count:
            parts.append(part)
        return part


def _table(rows: Sequence[np.ndarray], width: int | None = None, filler: int | None = None) -> np.ndarray:
    """(N, width) int64, by default as wide as the longest row: each row, filled up with its first number."""
    width = max(map(len, rows)) if width is None else width
    return np.stack(
        [np.concatenate([row, np.full(width - len(row), row[0] if filler is None else filler)]) for row in rows]
    )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shared_prompts: SharedPrompts | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' "sdpa" with packed rows, (1, heads, S, D) each; or as it is, where no prompts are shared.

    A prompt attends to itself, causally; a response to its prompt and, causally, to itself.

    Returns:
        (1, S, heads, D).
    """
    if shared_prompts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    layout = shared_prompts

    def at(places: Tensor) -> list[Tensor]:
        return [one[0][:, places].transpose(0, 1) for one in (query, key, value)]  # (rows, heads, length, D)

    prompts, responses = at(layout.prompts), at(layout.responses)
    # What a prompt's padding attends to is not read by anything.
    of_prompts, _ = sdpa_attention_forward(module, *prompts, None, **kwargs)
    keys, values = (
        torch.cat([of_prompt[layout.prompt_of], own], 2)
        for of_prompt, own in zip(prompts[1:], responses[1:], strict=True)
    )
    of_responses, _ = sdpa_attention_forward(module, responses[0], keys, values, layout.seen, **kwargs)
    found = torch.cat([of_prompts.flatten(0, 1), of_responses.flatten(0, 1)])
    return found[layout.restored][None], None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def share_prompts(model: Any) -> bool:
    """Let a model's decoder layers read packed rows; returns whether they can.

    All layers must attend to the full context, by transformers' "sdpa".
    """
    config = model.config
    kinds = {*(getattr(config, "layer_types", None) or ())}
    full = kinds == {"full_attention"} if kinds else getattr(config, "sliding_window", None) is None
    if full and config._attn_implementation == "sdpa":
        config._attn_implementation = ATTENTION  # its layers read this at each call
    return bool(config._attn_implementation == ATTENTION)


class Rows:
    """A micro-batch's rows as a model's layers read them: packed if they share prompts, else as they are."""

    def __init__(self, attention_mask: Tensor, scored_mask: Tensor, layout: SharedPrompts | None) -> None:
        self.layout = layout
        self.arguments: dict[str, Any]
        """Of the model, and of its layers."""
        self.scored: Any
        """Index of the N scored positions."""
        if layout is None:
            place = positions(attention_mask, attention_mask.shape, attention_mask.device)
            self.arguments, self.scored = {"attention_mask": attention_mask, "position_ids": place}, scored_mask
        else:
            # A mask with four dimensions counts as complete, so transformers makes none.
            none = attention_mask.new_empty(1, 1, 0, 0)
            self.arguments = {"attention_mask": none, "position_ids": layout.position_ids, "shared_prompts": layout}
            places = layout.places[scored_mask]
            self.scored = torch.zeros_like(places), places

    def pack(self, rows: Tensor) -> Tensor:
        """(B, T, ...) -> what layers read."""
        return rows if self.layout is None else self.layout.pack(rows)

    def unpack(self, read: Tensor) -> Tensor:
        """What layers return -> (B, T, ...)."""
        return read if self.layout is None else self.layout.unpack(read)
