"""What each latent action does: how often it is taken, what it says, and the text it steers to.

    texts ─> e ─┬─> idm: the action that each next token was labelled with ─> usage, typical tokens
                ├─> policy: how probable each action was ─────────────────────> usage
                └─> world model under every action ─> how many different tokens a state offers
    prefixes ─> one action forced at every step ─> steered texts

Legend: B rows, T positions, K actions.
"""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cola_ray.model.modeling_cola import CoLAForCausalLM

TYPICAL = 12  # tokens shown for an action
TRIED = 32  # states of a call of ``add`` in which all K actions are tried


@dataclass
class Atlas:
    """Sums over texts; ``add`` takes more of them."""

    num_actions: int
    labelled: np.ndarray = field(init=False)  # (K,) how often the IDM gave each action
    expected: np.ndarray = field(init=False)  # (K,) sum of the policy's probabilities
    tokens: list[Counter[int]] = field(init=False)  # of each action, next tokens that it labels
    agreed: np.ndarray = field(init=False)  # (K,) how often the world model says that very token
    reachable: list[int] = field(default_factory=list)  # different tokens under all K actions, a state
    steered: list[dict[str, str]] = field(default_factory=list)  # prefix, then a text for each action

    def __post_init__(self) -> None:
        self.labelled, self.expected, self.agreed = (np.zeros(self.num_actions) for _ in range(3))
        self.tokens = [Counter() for _ in range(self.num_actions)]

    @torch.no_grad()
    def add(self, model: CoLAForCausalLM, input_ids: Tensor, position_ids: Tensor, mask: Tensor) -> None:
        """Count packed rows, (B, T) each; where ``mask`` is true, the next token belongs to the same text."""
        e = model.encode(input_ids, position_ids=position_ids)
        mask = mask[:, :-1]
        if not mask.any():
            return
        taken = model.inverse_dynamics_actions(e, position_ids=position_ids)[mask]
        states, said = e[:, :-1][mask], input_ids[:, 1:][mask]
        probs = model.policy_logits(e, position_ids=position_ids)[:, :-1][mask].softmax(-1)
        self.labelled += np.bincount(taken.cpu().numpy(), minlength=self.num_actions)
        self.expected += probs.sum(0).double().cpu().numpy()
        right = model.world_model_logits(states, taken).argmax(-1) == said
        self.agreed += np.bincount(taken[right].cpu().numpy(), minlength=self.num_actions)
        for action, token in zip(taken.tolist(), said.tolist(), strict=True):
            self.tokens[action][token] += 1
        some = states[:: -(-len(states) // TRIED)]
        every = torch.arange(self.num_actions, device=e.device).expand(len(some), -1)
        offered = model.world_model_logits(some[:, None].expand(-1, self.num_actions, -1), every).argmax(-1)
        self.reachable += [len(set(row)) for row in offered.tolist()]

    def steer(
        self, model: CoLAForCausalLM, tokenizer: PreTrainedTokenizerBase, prefix: Sequence[int], actions: Sequence[int],
        new_tokens: int,
    ) -> None:  # fmt: skip
        """Continue a prefix with each of ``actions`` alone, and with the policy's most probable ones."""
        forced = torch.tensor([-1, *actions], device=model.device)[:, None].expand(-1, new_tokens)
        ids = torch.tensor([list(prefix)], device=model.device).expand(len(forced), -1)
        tokens, _, _ = model.generate_latent(ids, max_new_tokens=new_tokens, temperature=0.0, actions=forced)
        texts = (tokenizer.decode(row) for row in tokens.tolist())
        names = ("policy", *map(str, actions))
        self.steered.append({"prefix": tokenizer.decode(prefix), **dict(zip(names, texts, strict=True))})

    @property
    def by_usage(self) -> list[int]:
        """Actions, the most labelled first."""
        return [int(action) for action in np.argsort(-self.labelled, kind="stable")]

    def summary(self) -> dict[str, float]:
        """Alive actions, entropy of their usage (nats), agreement of world model and labels, tokens a state offers."""
        return {
            "tokens": float(self.labelled.sum()),
            "alive": float((self.labelled > 0).sum()),
            "usage_entropy": _entropy(self.labelled),
            "policy_entropy_of_mean": _entropy(self.expected),
            "agreement": float(self.agreed.sum() / max(self.labelled.sum(), 1)),
            "reachable_tokens": float(np.mean(self.reachable)) if self.reachable else 0.0,
        }

    def html(self, title: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """A page that needs no other file."""
        from jinja2 import Template

        total = max(self.labelled.sum(), 1)
        rows = [
            {
                "action": action,
                "share": 100 * self.labelled[action] / total,
                "expected": 100 * self.expected[action] / max(self.expected.sum(), 1e-9),
                "agreement": 100 * self.agreed[action] / max(self.labelled[action], 1),
                "tokens": [
                    (repr(tokenizer.decode([token]))[1:-1], 100 * count / max(self.labelled[action], 1))
                    for token, count in self.tokens[action].most_common(TYPICAL)
                ],
            }
            for action in self.by_usage
        ]
        page = Template((files("cola_ray.studies") / "atlas.html").read_text(), autoescape=True)
        return page.render(title=title, rows=rows, steered=self.steered, summary=self.summary(), plots=self._plots())

    def _plots(self) -> str:
        """Usage and reachable tokens, as a PNG in base64."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, (usage, offered) = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained", width_ratios=(3, 1))
        order, places = self.by_usage, np.arange(self.num_actions)
        usage.bar(places - 0.2, 100 * self.labelled[order] / max(self.labelled.sum(), 1), 0.4, label="labels (IDM)")
        usage.bar(places + 0.2, 100 * self.expected[order] / max(self.expected.sum(), 1e-9), 0.4, label="policy")
        usage.set_xticks(places, [str(action) for action in order], fontsize=6)
        usage.set(xlabel="latent action", ylabel="% of tokens")
        usage.legend()
        offered.hist(self.reachable, bins=np.arange(0.5, self.num_actions + 1.5))
        offered.set(xlabel="different tokens under all actions", ylabel="states")
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=110)
        plt.close(figure)
        return base64.b64encode(drawn.getvalue()).decode()


def _entropy(weights: np.ndarray) -> float:
    share = weights / max(weights.sum(), 1e-9)
    used = share[share > 0]
    return float(-(used * np.log(used)).sum())
