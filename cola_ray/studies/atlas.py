"""The action atlas: how often each latent action is taken, which tokens it gives, and which texts it leads to.

    texts ─> e ─┬─> IDM: the action that labels each next token ─> usage, typical tokens
                ├─> policy: the probability of each action ──────> usage
                └─> world model under every action ─> number of different next tokens that a state can reach
    prefixes ─> one action forced at every step ─> steered texts

Legend: B rows, T positions, K actions.
"""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from cola_ray.algorithms.spans import Spans
from cola_ray.checks.refusals import check
from cola_ray.learner.corpus import pack
from cola_ray.model.modeling_cola import CoLAForCausalLM
from cola_ray.runs.display import current, shown
from cola_ray.runs.failure import explained_failures
from cola_ray.runs.figures import print_summary
from cola_ray.settings.config import Config
from cola_ray.studies.study import load_texts, open_study, text_prefixes

TYPICAL = 12  # most frequent tokens shown for an action
TRIED = 32  # states per call of ``add`` in which all K actions are tried
STEERED = 8  # most frequent actions whose steered texts are shown


@shown()
@explained_failures()
def atlas(config: Config) -> dict[str, Any]:
    """Make an atlas from ``8 * diversity.prefixes`` texts; writes ``output_dir/atlas.html``.

    Runs in this process, on a GPU with ``cluster.use_gpu``.

    Returns:
        The summary: the figures of :meth:`Atlas.summary`.

    Raises:
        ConfigError: before anything is loaded.
        RunFailedError: the run failed; the message says why.
    """
    check(config, "atlas")
    device, dtype = torch.device("cuda" if config.cluster.use_gpu else "cpu"), getattr(torch, config.model.dtype)
    with open_study(config, "atlas") as study:
        config = study.config
        current().doing("opening the model and its texts")
        tokenizer, texts = load_texts(config, study.start)
        disable_progress_bar()
        model = CoLAForCausalLM.from_pretrained(config.model.path, dtype=dtype).eval().to(device)
        texts_used = texts[: 8 * config.diversity.prefixes]
        rows = pack(texts_used, config.pretrain.sequence_length, 0, config.pretrain.response_only)
        result, size = Atlas(model.config.num_actions), config.pretrain.micro_batch_size
        for first in range(0, len(rows), size):
            piece = [torch.from_numpy(a[first : first + size]).to(device) for a in astuple(rows)]
            result.add(model, *piece)
            current().update("atlas: actions in the texts", min(first + size, len(rows)), len(rows))
        current().doing("atlas: texts that one action steers")
        for prefix in text_prefixes(config, texts)[:3]:
            result.steer(model, tokenizer, prefix, result.by_usage[:STEERED], config.rollout.max_new_tokens)
        page = study.output / "atlas.html"
        page.write_text(result.html(f"Latent actions of {study.start}", tokenizer))
        study.tracker.log(0, result.summary())
        study.summary |= {"texts": len(texts_used), **result.summary()}
    print_summary(f"action atlas: {page}", study.tracker.summary)
    return study.tracker.summary


@dataclass
class Atlas:
    """Counts over texts; each call of :meth:`add` adds more texts."""

    num_actions: int
    labelled: np.ndarray = field(init=False)  # (K,) tokens that the IDM labels with each action
    expected: np.ndarray = field(init=False)  # (K,) sums of the policy's probabilities
    tokens: list[Counter[int]] = field(init=False)  # for each action, the tokens that it labels
    agreed: np.ndarray = field(init=False)  # (K,) labelled tokens that the world model also predicts under that action
    reachable: list[int] = field(default_factory=list)  # per state tried, different tokens under the K actions
    steered: list[dict[str, str]] = field(default_factory=list)  # prefix and the text of each action

    def __post_init__(self) -> None:
        self.labelled, self.expected, self.agreed = (np.zeros(self.num_actions) for _ in range(3))
        self.tokens = [Counter() for _ in range(self.num_actions)]

    @torch.no_grad()
    def add(
        self, model: CoLAForCausalLM, input_ids: Tensor, position_ids: Tensor, mask: Tensor, steps: Tensor | None = None
    ) -> None:
        """Add packed rows, (B, T) each; ``mask`` is true where the next token belongs to the same text."""
        e = model.encode(input_ids, position_ids=position_ids)
        mask = mask[:, :-1]
        if not mask.any():
            return
        counted = position_ids if steps is None else steps
        spans = Spans.of(mask, position_ids[:, :-1], counted[:, :-1], model.config.action_every)
        labels = spans.pooled(model.inverse_dynamics_logits(e, position_ids=position_ids)[:, 1:][mask]).argmax(-1)
        taken = spans.spread(labels)
        states, tokens = e[:, :-1][mask], input_ids[:, 1:][mask]
        held = spans.held(labels) if model.config.learnt_ends else None
        probs = model.policy(e[:, :-1], position_ids=position_ids[:, :-1], scored=spans.starts, held=held).softmax(-1)
        self.labelled += np.bincount(taken.cpu().numpy(), minlength=self.num_actions)
        self.expected += probs.sum(0).double().cpu().numpy()
        right = model.world_model_logits(states, taken).argmax(-1) == tokens
        self.agreed += np.bincount(taken[right].cpu().numpy(), minlength=self.num_actions)
        for action, token in zip(taken.tolist(), tokens.tolist(), strict=True):
            self.tokens[action][token] += 1
        tried = states[:: -(-len(states) // TRIED)]
        every = torch.arange(self.num_actions, device=e.device).expand(len(tried), -1)
        reached = model.world_model_logits(tried[:, None].expand(-1, self.num_actions, -1), every).argmax(-1)
        self.reachable += [len(set(row)) for row in reached.tolist()]

    def steer(
        self, model: CoLAForCausalLM, tokenizer: PreTrainedTokenizerBase, prefix: Sequence[int], actions: Sequence[int],
        new_tokens: int,
    ) -> None:  # fmt: skip
        """Continue a prefix with each of ``actions`` forced at every step, and with the policy's greedy actions."""
        forced = torch.tensor([-1, *actions], device=model.device)[:, None].expand(-1, new_tokens)
        ids = torch.tensor([list(prefix)], device=model.device).expand(len(forced), -1)
        tokens, _, _ = model.generate_latent(ids, max_new_tokens=new_tokens, temperature=0.0, actions=forced)
        texts = (tokenizer.decode(row) for row in tokens.tolist())
        names = ("policy", *map(str, actions))
        self.steered.append({"prefix": tokenizer.decode(prefix), **dict(zip(names, texts, strict=True))})

    @property
    def by_usage(self) -> list[int]:
        """Action ids, sorted by how many tokens they label, most first."""
        return [int(action) for action in np.argsort(-self.labelled, kind="stable")]

    def summary(self) -> dict[str, float]:
        """Numbers of tokens and of used actions, entropies of usage (nats), agreement, reachable tokens per state."""
        return {
            "tokens": float(self.labelled.sum()),
            "alive": float((self.labelled > 0).sum()),
            "usage_entropy": _entropy(self.labelled),
            "policy_entropy_of_mean": _entropy(self.expected),
            "agreement": float(self.agreed.sum() / max(self.labelled.sum(), 1)),
            "reachable_tokens": float(np.mean(self.reachable)) if self.reachable else 0.0,
        }

    def html(self, title: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """The atlas as a self-contained HTML page."""
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
        """Plots of usage and reachable tokens, as a PNG in base64."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, (usage, reachable) = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained", width_ratios=(3, 1))
        order, places = self.by_usage, np.arange(self.num_actions)
        usage.bar(places - 0.2, 100 * self.labelled[order] / max(self.labelled.sum(), 1), 0.4, label="labels (IDM)")
        usage.bar(places + 0.2, 100 * self.expected[order] / max(self.expected.sum(), 1e-9), 0.4, label="policy")
        usage.set_xticks(places, [str(action) for action in order], fontsize=6)
        usage.set(xlabel="latent action", ylabel="% of tokens")
        usage.legend()
        reachable.hist(self.reachable, bins=np.arange(0.5, self.num_actions + 1.5))
        reachable.set(xlabel="different tokens under all actions", ylabel="states")
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=110)
        plt.close(figure)
        return base64.b64encode(drawn.getvalue()).decode()


def _entropy(weights: np.ndarray) -> float:
    share = weights / max(weights.sum(), 1e-9)
    used = share[share > 0]
    return float(-(used * np.log(used)).sum())
