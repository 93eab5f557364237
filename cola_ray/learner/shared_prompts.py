"""A prompt is computed once for all of its completions in a micro-batch.

    rows (B, T)       p p a a a      packed (1, S)   p p | q | a a a | b b | c        position ids  0 1 0 2 3 4 2 3 1
                      p p b b -
                      q c - - -      attention       a prompt to itself; a response to its prompt and to itself

The states of a prompt are the same in every row that begins with it, and its gradient is the sum over these rows.
Projections, MLPs and norms work token by token, so they read packed rows, which also have no padding. Attention is
computed for prompts and for responses separately (:func:`attention`).
Source: Liu et al. 2025, "Prefix Grouper" (arXiv 2506.05433).

Legend: B rows, T positions, N of them scored, S packed positions, G different prompts of at most P tokens, responses
of at most L, D size of an attention head.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cola_ray.model.families import sees_everything
from cola_ray.model.modeling_cola import positions

ATTENTION = "shared_prompts"
"""Name of :func:`attention` among transformers' attention implementations; without shared prompts it is "sdpa"."""


@dataclass(frozen=True)
class SharedPrompts:
    """Where the positions of a micro-batch's rows are in its packed form; all int64."""

    tokens: Tensor  # (S,), for each packed position its place in the flattened rows, b * T + t
    places: Tensor  # (B, T), for each position its packed place; 0 for padding
    position_ids: Tensor  # (1, S)
    prompts: Tensor  # (G, P), packed places; beyond a prompt's end, places of other tokens
    responses: Tensor  # (B, L), packed places; beyond a response's end, places of other tokens
    prompt_of: Tensor  # (B,), the number in ``prompts`` of each row's prompt
    before: Tensor  # (B,), the length of each row's prompt
    restored: Tensor  # (S,), for each packed position its place in flattened prompts, then flattened responses

    @classmethod
    def of(cls, prompts: Sequence[Hashable], lengths: Sequence[tuple[int, int]], width: int) -> "SharedPrompts | None":
        """The layout of B rows; None if no two of them have the same prompt, or none has a response.

        Args:
            prompts: for each row a key, the same for rows with the same prompt.
            lengths: for each row the tokens of its prompt and of its response; the latter may be 0.
            width: T.
        """
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        if len(numbers) == len(prompts) or not any(said for _, said in lengths):
            return None
        prompt_of = np.array([numbers[prompt] for prompt in prompts])
        owners = np.unique(prompt_of, return_index=True)[1]  # for each prompt the first row with it
        before, said = np.array(lengths).T
        of_prompts = int(before[owners].sum())
        packed = of_prompts + int(said.sum())
        prompts_at, prompts_real = _table(before[owners], 0, packed)
        responses_at, responses_real = _table(said, of_prompts, packed)
        of_prompt, of_response = (np.arange(table.shape[1]) for table in (prompts_at, responses_at))
        steps = np.arange(width)
        places = np.where(steps < before[:, None], prompts_at[prompt_of, :1] + steps,
                          responses_at[:, :1] + steps - before[:, None])  # fmt: skip
        tokens = (
            owners[:, None] * width + of_prompt,
            np.arange(len(said))[:, None] * width + before[:, None] + of_response,
        )
        positions = np.broadcast_to(of_prompt, prompts_at.shape), before[:, None] + of_response
        real = prompts_real, responses_real
        restored = np.flatnonzero(prompts_real), prompts_real.size + np.flatnonzero(responses_real)
        found = (
            np.concatenate([table[of] for table, of in zip(tokens, real, strict=True)]),
            np.where(steps < (before + said)[:, None], places, 0),
            np.concatenate([table[of] for table, of in zip(positions, real, strict=True)])[None],
            prompts_at, responses_at, prompt_of, before, np.concatenate(restored),
        )  # fmt: skip
        return cls(*map(torch.from_numpy, found))

    def to(self, device: torch.device) -> "SharedPrompts":
        return SharedPrompts(**{name: one.to(device) for name, one in vars(self).items()})

    @property
    def seen(self) -> Tensor:
        """(B, 1, L, P + L) bool: the positions in its prompt and response that each response position attends to."""
        longest, length = self.prompts.shape[1], self.responses.shape[1]
        of_prompt = torch.arange(longest, device=self.before.device) < self.before[:, None]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.before.device).tril()
        rows = len(self.before)
        return torch.cat([of_prompt[:, None].expand(-1, length, -1), causal.expand(rows, -1, -1)], -1)[:, None]

    def pack(self, rows: Tensor) -> Tensor:
        """(B, T, ...) -> (1, S, ...); a shared prompt's values are taken from its first row."""
        return rows.flatten(0, 1)[self.tokens][None]

    def unpack(self, packed: Tensor) -> Tensor:
        """(1, S, ...) -> (B, T, ...); padding gets the values of some token."""
        return packed[0][self.places]


def _table(lengths: np.ndarray, start: int, packed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places (n, longest) of n parts that are packed one after another from ``start`` on; and which are not padding.

    Padding has places of other parts, which differ within a row, since gradients are added up at each place.
    """
    steps = np.arange(lengths.max())
    starts = start + np.cumsum(lengths) - lengths
    return (starts[:, None] + steps) % packed, steps < lengths[:, None]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    shared_prompts: SharedPrompts | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' "sdpa" for packed rows; plain "sdpa" where no prompts are shared.

    A prompt attends to itself, causally; a response attends to its prompt and, causally, to itself.

    Args:
        query: (1, heads, S, D) with shared prompts, as are ``key`` and ``value``.
        attention_mask: with shared prompts, :attr:`SharedPrompts.seen`.

    Returns:
        (1, S, heads, D) with shared prompts, and None.
    """
    if shared_prompts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    layout = shared_prompts

    def at(places: Tensor) -> list[Tensor]:
        return [one[0][:, places].transpose(0, 1) for one in (query, key, value)]  # (rows, heads, length, D)

    prompts, responses = at(layout.prompts), at(layout.responses)
    # The outputs at a prompt's padding are never read.
    of_prompts, _ = sdpa_attention_forward(module, *prompts, None, **kwargs)
    keys, values = (
        torch.cat([of_prompt[layout.prompt_of], own], 2)
        for of_prompt, own in zip(prompts[1:], responses[1:], strict=True)
    )
    of_responses, _ = sdpa_attention_forward(module, responses[0], keys, values, attention_mask, **kwargs)
    found = torch.cat([of_prompts.flatten(0, 1), of_responses.flatten(0, 1)])
    return found[layout.restored][None], None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def share_prompts(model: Any) -> bool:
    """Let a model's decoder layers read packed rows, if they can; returns whether they can."""
    config = model.config
    if sees_everything(config) and config._attn_implementation == "sdpa":
        config._attn_implementation = ATTENTION  # its layers read this at each call
    return bool(config._attn_implementation == ATTENTION)


class LayerInputs:
    """A micro-batch's rows as a model's layers read them: packed if they share prompts, else as they are."""

    def __init__(self, attention_mask: Tensor, scored_mask: Tensor, layout: SharedPrompts | None) -> None:
        self.layout = layout
        self.arguments: dict[str, Any]
        """Keyword arguments of every forward pass over these rows."""
        self.scored: Any
        """Index of the N scored positions in what layers return."""
        if layout is None:
            place = positions(attention_mask, attention_mask.shape, attention_mask.device)
            self.arguments, self.scored = {"attention_mask": attention_mask, "position_ids": place}, scored_mask
        else:
            # transformers takes a mask with four dimensions as it is.
            self.arguments = {
                "attention_mask": layout.seen, "position_ids": layout.position_ids, "shared_prompts": layout
            }  # fmt: skip
            places = layout.places[scored_mask]
            self.scored = torch.zeros_like(places), places

    def pack(self, rows: Tensor) -> Tensor:
        """(B, T, ...) -> what layers read, (1, S, ...) if packed."""
        return rows if self.layout is None else self.layout.pack(rows)

    def unpack(self, read: Tensor) -> Tensor:
        """What layers return -> (B, T, ...)."""
        return read if self.layout is None else self.layout.unpack(read)
