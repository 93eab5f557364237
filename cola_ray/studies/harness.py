"""A CoLA model as a model of EleutherAI's evaluation harness, and its bare base for comparison.

loglikelihood    CoLAForCausalLM.token_log_probs: marginal over actions, under greedy actions, or of the bare base
generate_until   greedy decoding in vLLM, over latent actions or over the base's tokens
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import AutoTokenizer

from cola_ray.model.action_requests import BASE_TOKENS
from cola_ray.model.modeling_cola import CoLAForCausalLM, Likelihood
from cola_ray.rollout.engine import LatentEngine, Request
from cola_ray.settings.config import Config
from cola_ray.tasks.chat import ChatTokenizer
from cola_ray.tasks.endings import Endings

_POSITIONS = 16  # positions scored at a time, to limit memory for (16, K, V) logits


@register_model("cola_ray")
class HarnessModel(TemplateLM):
    """``lm_eval --model cola_ray --model_args pretrained=MODEL,likelihood=marginal``.

    Args:
        pretrained: directory of a CoLA model.
        likelihood: how texts are scored; with "base" the bare base also generates.
        dtype: of the weights.
        batch_size: texts per forward pass.
        max_gen_toks: most tokens to generate, unless a task says otherwise.
    """

    def __init__(
        self, pretrained: str, likelihood: Likelihood = "marginal", dtype: str = "float32", batch_size: int | str = 8,
        max_gen_toks: int = 256, **_: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.path, self.likelihood, self.dtype, self.max_gen_toks = pretrained, likelihood, dtype, max_gen_toks
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 8
        self.tokenizer = AutoTokenizer.from_pretrained(pretrained)
        self.chat = ChatTokenizer(self.tokenizer, "")
        self.endings = Endings.of(self.tokenizer, pretrained)
        self.on = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = CoLAForCausalLM.from_pretrained(pretrained, dtype=getattr(torch, dtype))
        if likelihood != "base" and (lasting := model.config.lasting):
            raise ValueError(
                f"harness.likelihoods = {likelihood!r}: the model's actions last ({lasting}), "
                "and a token's probability depends on where its action began; use base"
            )
        self.model = model.eval().to(self.on)
        self.max_length = int(model.config.max_position_embeddings)
        self.engine: LatentEngine | None = None

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        return self.chat.begin[0] if self.chat.begin else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode as in training: with BOS if the tokenizer has one, unless ``add_special_tokens`` is False."""
        return [*(self.chat.begin if add_special_tokens is not False else ()), *self.chat.text_ids(string)]

    # --- likelihoods ----------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        begin = self.chat.begin  # a text without context has BOS twice: as its context and as its first token
        pairs = [(context, ids[1:] if begin and ids[:1] == begin else ids) for _, context, ids in requests]
        # Texts of similar length share a forward pass.
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for i, score in zip(batch, self._score([pairs[i] for i in batch]), strict=True):
                scores[i] = score
        return scores

    @torch.inference_mode()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether greedy decoding would give it."""
        rows = [([*context, *ids][-self.max_length - 1 :], len(ids)) for context, ids in pairs]
        width = max(len(ids) - 1 for ids, _ in rows)
        ids = torch.zeros((len(rows), width), dtype=torch.int64, device=self.on)
        attention_mask = torch.zeros_like(ids)
        for row, (text, _) in enumerate(rows):
            ids[row, : len(text) - 1] = torch.tensor(text[:-1])
            attention_mask[row, : len(text) - 1] = 1
        e = self.model.encode(ids, attention_mask)
        policy = self.model.policy_logits(e, attention_mask)
        for row, (text, length) in enumerate(rows):
            end = len(text) - 1
            span = slice(max(end - length, 0), end)
            targets = torch.tensor(text[span.start + 1 :], device=self.on)
            total, greedy = 0.0, True
            for start in range(0, len(targets), _POSITIONS):
                piece = slice(span.start + start, min(span.start + start + _POSITIONS, end))
                log_probs = self.model.token_log_probs(e[row, piece], policy[row, piece], self.likelihood)
                tokens = targets[start : start + _POSITIONS]
                total += float(log_probs.gather(-1, tokens[:, None]).sum())
                greedy = greedy and bool((log_probs.argmax(-1) == tokens).all())
            yield total, greedy

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts, summed over windows that share no token."""
        found = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text, False), self.prefix_token_id, self.max_length, 1)
            pieces = [(("", ""), *make_disjoint_window(window)) for window in windows]
            found.append(sum(score for score, _ in self._loglikelihood_tokens(pieces)))
        return found

    # --- generation -----------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate up to the first stop string, an end token, or the token budget of a request."""
        asked = [(context, dict(settings)) for context, settings in (request.args for request in requests)]
        budgets = [int(settings.get("max_gen_toks", self.max_gen_toks)) for _, settings in asked]
        made = self._engine().generate([
            self._request(context, min(budget, self.max_length // 2), settings)
            for (context, settings), budget in zip(asked, budgets, strict=True)
        ])  # fmt: skip
        return [
            dataclasses.replace(self.endings, strings=_until(settings)).text(one.token_ids)
            for one, (_, settings) in zip(made, asked, strict=True)
        ]

    def _request(self, context: str, budget: int, settings: dict[str, Any]) -> Request:
        begin = self.chat.begin
        prompt = [*begin, *self.tok_encode(context, False)[-(self.max_length - budget - len(begin)) :]]
        temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
        forced = [BASE_TOKENS] * budget if self.likelihood == "base" else []
        return Request(prompt, 0, temperature, 0, budget, forced, _until(settings))

    def _engine(self) -> LatentEngine:
        if self.engine is None:
            self.engine = LatentEngine(
                self.path, dtype=self.dtype, max_model_len=self.max_length, stop_token_ids=self.endings.token_ids,
                tokenizer=self.tokenizer,
            )  # fmt: skip
        return self.engine

    def close(self) -> None:
        """Close the engine if one was started."""
        if self.engine is not None:
            self.engine.close()


def _until(settings: Mapping[str, Any]) -> tuple[str, ...]:
    stops = settings.get("until") or ()
    return tuple(stop for stop in ([stops] if isinstance(stops, str) else stops) if stop)


def score(config: Config, likelihood: Likelihood) -> dict[str, Any]:
    """Score the model at ``model.path`` on ``harness.tasks``: results, versions and sample counts of the harness."""
    settings = config.harness
    model = HarnessModel(config.model.path, likelihood, config.model.dtype)
    found = simple_evaluate(
        model, tasks=list(settings.tasks), task_manager=TaskManager(include_path=settings.include_path or None),
        limit=settings.limit or None, num_fewshot=settings.num_fewshot if settings.num_fewshot >= 0 else None,
        random_seed=config.seed,
    )  # fmt: skip
    model.close()
    kept = {name: found[name] for name in ("results", "versions", "n-shot", "n-samples")}
    return json.loads(json.dumps(kept, default=str))
