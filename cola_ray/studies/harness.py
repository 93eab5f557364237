"""A CoLA model for EleutherAI's evaluation harness, beside the bare base that it was made of.

loglikelihood    CoLAForCausalLM.token_log_probs: marginal over actions, greedy in them, or the bare base's
generate_until   in vLLM, greedily: latent actions, or the base's tokens
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

from cola_ray.model.action_columns import BASE_TOKENS
from cola_ray.model.modeling_cola import CoLAForCausalLM, Likelihood
from cola_ray.rollout.engine import LatentEngine, Request
from cola_ray.settings.config import Config
from cola_ray.tasks.chat import ChatTokenizer
from cola_ray.tasks.endings import Endings

_POSITIONS = 16  # scored at a time, so that (16, K, V) fits


@register_model("cola_ray")
class HarnessModel(TemplateLM):
    """``lm_eval --model cola_ray --model_args pretrained=MODEL,likelihood=marginal``.

    Args:
        pretrained: a CoLA model's directory.
        likelihood: of texts; "base" also generates by the base alone.
        dtype: of weights.
        batch_size: texts in a forward pass.
        max_gen_toks: tokens generated where a task does not say.
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
        self.model = model.eval().to(self.on)
        self.max_length = int(model.config.max_position_embeddings)
        self.engine: LatentEngine | None = None

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        return self.chat.begin[0] if self.chat.begin else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """As the model was trained on texts, with BOS where the tokenizer has one, unless it is said otherwise."""
        return [*(self.chat.begin if add_special_tokens is not False else ()), *self.chat.text_ids(string)]

    # --- likelihoods ----------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        begin = self.chat.begin  # which a text without context has twice: as its context, and as its own
        pairs = [(context, said[1:] if begin and said[:1] == begin else said) for _, context, said in requests]
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))  # like lengths share a pass
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        for start in range(0, len(order), self.batch_size):
            some = order[start : start + self.batch_size]
            for i, scored in zip(some, self._scored([pairs[i] for i in some]), strict=True):
                found[i] = scored
        return found

    @torch.inference_mode()
    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        """Log-probability of what was said after its context, and whether it is what would be said greedily."""
        rows = [([*context, *said][-self.max_length - 1 :], len(said)) for context, said in pairs]
        width = max(len(ids) - 1 for ids, _ in rows)
        ids = torch.zeros((len(rows), width), dtype=torch.int64, device=self.on)
        attended = torch.zeros_like(ids)
        for row, (whole, _) in enumerate(rows):
            ids[row, : len(whole) - 1] = torch.tensor(whole[:-1])
            attended[row, : len(whole) - 1] = 1
        e = self.model.encode(ids, attended)
        policy = self.model.policy_logits(e, attended)
        for row, (whole, length) in enumerate(rows):
            end = len(whole) - 1
            span = slice(max(end - length, 0), end)
            wanted = torch.tensor(whole[span.start + 1 :], device=self.on)
            total, greedy = 0.0, True
            for start in range(0, len(wanted), _POSITIONS):
                piece = slice(span.start + start, min(span.start + start + _POSITIONS, end))
                log_probs = self.model.token_log_probs(e[row, piece], policy[row, piece], self.likelihood)
                said = wanted[start : start + _POSITIONS]
                total += float(log_probs.gather(-1, said[:, None]).sum())
                greedy = greedy and bool((log_probs.argmax(-1) == said).all())
            yield total, greedy

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows that share no token."""
        found = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text, False), self.prefix_token_id, self.max_length, 1)
            pieces = [(("", ""), *make_disjoint_window(window)) for window in windows]
            found.append(sum(score for score, _ in self._loglikelihood_tokens(pieces)))
        return found

    # --- generation -----------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first of a request's stop strings, an end token, or the budget."""
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
        """End the engine, if one was started."""
        if self.engine is not None:
            self.engine.close()


def _until(settings: Mapping[str, Any]) -> tuple[str, ...]:
    stops = settings.get("until") or ()
    return tuple(stop for stop in ([stops] if isinstance(stops, str) else stops) if stop)


def score(config: Config, likelihood: Likelihood) -> dict[str, Any]:
    """Results, versions and sample counts of ``config.harness.tasks`` for the model at ``model.path``."""
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
