"""Rollout actors: an engine and a tokenizer, shared by all calls; the only state is weights and caches.

    EngineWorker           update_weights, and the RunningBatch that every call joins
      RolloutWorker        generate_groups, evaluate: single-turn problems with verifiable answers
        EvaluationWorker   answer, in every way that evaluations compare (rollout/evaluation_worker.py)
      AgentWorker          play_episodes, speak, evaluate: multi-turn environments (rollout/agent_worker.py)
      ContinuationWorker   continue_prefixes: for studies of diversity (rollout/continuation_worker.py)

    generate_groups(tickets) ─> requests ─> RunningBatch ─> completions ─> texts ─> rewards ─> Groups of one Share

Calls overlap, since the actor is asyncio.
"""

import asyncio
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cola_ray.batch import Group, apart, as_groups
from cola_ray.experience import Answer, Ticket, Trajectory
from cola_ray.model.action_requests import BASE_TOKENS
from cola_ray.model.families import sees_everything
from cola_ray.rollout.batching import RunningBatch
from cola_ray.rollout.engine import Completion, Engine, LatentEngine, Request, TokenEngine, prepare_process
from cola_ray.rollout.reward_model import RewardFunction, score_with
from cola_ray.rollout.reward_process import Reward, RewardProcess, added
from cola_ray.runs.tracking import peak_memory_gb
from cola_ray.settings.config import Config
from cola_ray.tasks import make_task, stop_strings
from cola_ray.tasks.chat import ChatTokenizer
from cola_ray.tasks.endings import Endings
from cola_ray.tasks.protocol import Split, further
from cola_ray.tasks.rewarded import REWARD_MODEL, weights_of
from cola_ray.weights import Bucket, Offer


def engine_args(config: Config) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` from the settings, in addition to those that every engine has."""
    rollout = config.rollout
    args: dict[str, Any] = {"enable_prefix_caching": rollout.prefix_caching}
    if rollout.max_num_batched_tokens:
        args["max_num_batched_tokens"] = rollout.max_num_batched_tokens
    if config.cluster.use_gpu:
        args |= {
            name: getattr(rollout, name)
            for name in ("gpu_memory_utilization", "kv_cache_dtype", "enforce_eager", "async_scheduling")
        }
        args |= {} if rollout.quantization == "none" else {"quantization": rollout.quantization}
        args |= {} if rollout.enforce_eager else {"optimization_level": rollout.optimization_level}
    return args | rollout.engine_args


class EngineWorker:
    """An engine whose weights follow the learner's. cluster/actors.py makes its subclasses Ray actors."""

    def __init__(self, config: Config, model_path: str, keep_hidden_states: bool) -> None:
        prepare_process(config.cluster.threads_per_process)
        from transformers import AutoTokenizer

        rollout = config.rollout
        self.config = config
        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.chat = ChatTokenizer(self.tokenizer, config.data.date, config.data.chat_options)
        self.endings = Endings.of(self.tokenizer, model_path, [*rollout.stop, *stop_strings(config.task)])
        self.latent = config.rl.action_space == "latent"
        beta = config.rl.kl_coef if config.rl.actor_free else 0.0
        make: Callable[..., Engine] = (
            functools.partial(LatentEngine, keep_hidden_states=keep_hidden_states, soft_q_beta=beta)
            if self.latent
            else functools.partial(TokenEngine, adapters=config.rl.lora_rank > 0, steering=config.rl.steering)
        )
        self.engine = make(
            model_path,
            dtype=config.model.dtype,
            max_model_len=rollout.max_prompt_tokens + rollout.max_new_tokens,
            stop_token_ids=self.endings.token_ids,
            tokenizer=self.tokenizer,
            max_num_seqs=rollout.max_num_seqs,
            kv_cache_mb=rollout.kv_cache_mb,
            tensor_parallel_size=rollout.tensor_parallel_size,
            num_threads=config.cluster.threads_per_process,
            **engine_args(config),
        )
        if self.latent and self.engine.action_every != config.model.action_every:
            raise ValueError(f"model.action_every = {config.model.action_every}: actions of the served model last "
                             f"{self.engine.action_every} tokens; use that")  # fmt: skip
        if self.latent and self.engine.learnt_ends != config.model.learnt_ends:
            raise ValueError(f"model.learnt_ends = {config.model.learnt_ends}: the served model has "
                             f"{self.engine.learnt_ends}; use that")  # fmt: skip
        self.batch = RunningBatch(self.engine, drain=config.rl.update_mode == "drain")

    @property
    def served(self) -> Any:
        """The served checkpoint's configuration."""
        return self.engine.llm.llm_engine.model_config.hf_config

    @property
    def num_actions(self) -> int:
        """Number of codes of the served checkpoint, or of tokens of a plain base."""
        return int(self.served.num_actions if self.latent else self.served.vocab_size)

    async def facts(self) -> dict[str, object]:
        """Return facts that the driver asks for once.

        They are the padding id, vLLM's version, and whether the model's attention allows the learner to compute a
        prompt once for several completions.
        """
        import vllm

        return {
            "pad_token_id": self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            "vllm_version": vllm.__version__,
            "shares_prompts": sees_everything(self.served),
        }

    async def update_weights(self, version: int, *buckets: Bucket) -> int:
        """Load ``version`` and return it. Requests in flight finish first in update mode drain, but not in continue."""
        await self.batch.swap(lambda: self.engine.update_weights(version, buckets))
        return version

    async def receive_weights(self, offer: Offer) -> int:
        """Load a version by broadcast, together with all other members of the offer's channel, and return it."""
        await self.batch.swap(lambda: self.engine.receive_weights(offer))
        return offer.version

    async def peak_memory_gb(self) -> float:
        return peak_memory_gb()

    def _sampled(
        self, prompt: Sequence[int], seed: int, limit: int, temperature: float | None = None, **more: Any
    ) -> Request:
        """A request sampled as the settings say, at their temperature unless another is given. Temperature 0 is greedy,
        and scored without truncation."""
        rollout = self.config.rollout
        heat = rollout.temperature if temperature is None else temperature
        top_k, top_p = (rollout.top_k, rollout.top_p) if heat else (0, 1.0)
        return Request(prompt, seed, heat, top_k, limit, top_p=top_p, **more)

    def _seed(self, *place: int) -> int:
        """Return the seed of a request's draws, which depends on the run's seed and ``place`` alone."""
        return int(np.random.SeedSequence((self.config.seed, *place)).generate_state(1, np.uint64)[0] >> 2)


class RolloutWorker(EngineWorker):
    """Turns problem indices into scored groups.

    Args:
        reward_model: scores responses in place of the task's verifier, or as one of the rewards in ``task.reward``.
    """

    def __init__(self, config: Config, model_path: str, reward_model: RewardFunction | None = None) -> None:
        self.reward_model, self.weights = reward_model, weights_of(config.task)
        self.task = make_task(config.task, config.seed)
        own = {name: weight for name, weight in self.weights.items() if name != REWARD_MODEL}
        if reward_model is None or own:
            make = functools.partial(make_task, config.task, config.seed)
            weights = {} if config.task.thinking else own
            batched = getattr(self.task, "batched", False)
            self.rewards = RewardProcess(make, config.task.reward_timeout_s, weights, reward_model is not None, batched)
        super().__init__(config, model_path, config.rl.cache_hidden_states)
        self.draws_greedy = config.algorithm.greedy
        splits: tuple[Split, ...] = ("train", "heldout")
        self.prompts = {
            split: [self.chat.prompt_ids(problem.question) for problem in self.task.problems(split)] for split in splits
        }
        limit = config.rollout.max_prompt_tokens
        self.fitting = {
            split: [i for i, prompt in enumerate(prompts) if len(prompt) <= limit]
            for split, prompts in self.prompts.items()
        }

    async def facts(self) -> dict[str, object]:
        return {
            **await super().facts(),
            "num_train": len(self.fitting["train"]),
            "num_too_long": len(self.prompts["train"]) - len(self.fitting["train"]),
            "num_heldout": len(self.fitting["heldout"]),
            "num_heldout_too_long": len(self.prompts["heldout"]) - len(self.fitting["heldout"]),
            **self._sources(),
        }

    def _sources(self) -> dict[str, list[str]]:
        """The source of each held-out problem whose prompt fits, if the task has several."""
        problems = self.task.problems("heldout")
        found = [further(problems[index])[1] for index in self.fitting["heldout"]]
        return {"heldout_sources": found} if any(found) else {}

    async def generate_groups(self, tickets: Sequence[Ticket]) -> list[Group]:
        """Return a group of ``rl.group_size`` scored completions per ticket, in order; all groups are in one share.

        Draws depend only on (run seed, ticket's position, index within the group), so it does not matter which worker
        generates a group, when, or how often.
        """
        indices = [self.fitting["train"][ticket.problem] for ticket in tickets]
        size = self.config.rl.group_size
        per_ticket = size + self.draws_greedy  # ReMax's baseline is a greedy completion, the last one
        requests = [
            self._request(self.prompts["train"][index], self._seed(ticket.position, sibling), greedy=sibling == size)
            for ticket, index in zip(tickets, indices, strict=True)
            for sibling in range(per_ticket)
        ]
        completions = await self.batch.complete(requests)
        owners = [index for index in indices for _ in range(per_ticket)]
        texts = [self.endings.text(completion.token_ids) for completion in completions]
        rewards = await self._score("train", owners, texts)
        made = [self._trajectory("train", *one) for one in zip(owners, completions, texts, rewards, strict=True)]
        groups = [made[start : start + per_ticket] for start in range(0, len(made), per_ticket)]
        completed = [
            (ticket.position, group[:size], group[size] if self.draws_greedy else None)
            for ticket, group in zip(tickets, groups, strict=True)
        ]
        shared = [(position, [*map(self._with_decisions, group)], greedy) for position, group, greedy in completed]
        return [self._with_texts(group, made) for group, (_, made, _) in zip(as_groups(shared), completed, strict=True)]

    def _with_decisions(self, made: Trajectory) -> Trajectory:
        """The completion as it is learnt from: held actions are masked, since they are not decisions."""
        every = self.config.model.action_every
        return made if every == 1 else replace(made, action_mask=np.arange(len(made.actions)) % every == 0)

    def _with_texts(self, group: Group, made: Sequence[Trajectory]) -> Group:
        """Add the completions of a step's first groups unchanged, if the step's samples are kept."""
        rl = self.config.rl
        if not self.config.samples.has(group.position, rl.prompts_per_step, rl.max_steps):
            return group
        return replace(group, read=tuple(replace(one, hidden_states=None) for one in made))

    async def generate_in_parts(self, tickets: Sequence[Ticket]) -> list[Any]:
        """Like ``generate_groups``, but return the groups first, then each part of their share's data (``apart``)."""
        groups, data = apart(await self.generate_groups(tickets))
        return [groups, *data]

    def _request(self, prompt: Sequence[int], seed: int, greedy: bool) -> Request:
        limit = self.config.rollout.max_new_tokens
        return self._sampled(prompt, seed, limit, 0.0 if greedy else None, stop=self.endings.strings)

    async def evaluate(self, indices: Sequence[int], bare_base: bool) -> list[Answer]:
        """Answer held-out problems greedily, by the policy or the bare base; rewards are NaN if scoring failed.

        Args:
            indices: among the held-out problems whose prompts fit into ``rollout.max_prompt_tokens``.
            bare_base: force the action that passes the base's own tokens through.
        """
        problems = [self.fitting["heldout"][index] for index in indices]
        requests = [self._greedy_request(self.prompts["heldout"][problem], bare_base) for problem in problems]
        completions = await self.batch.complete(requests)
        texts = [self.endings.text(completion.token_ids) for completion in completions]
        scored = await self._score("heldout", problems, texts)
        kept = self.config.samples.prompts
        return [
            Answer(
                math.nan if reward.failure else reward.value,
                (self._trajectory("heldout", problem, replace(completion, hidden_states=None), text, reward),)
                if index < kept
                else (),
            )
            for index, problem, completion, text, reward in zip(
                indices, problems, completions, texts, scored, strict=True
            )
        ]

    def _greedy_request(self, prompt: Sequence[int], bare_base: bool = False) -> Request:
        limit = self.config.rollout.max_new_tokens
        # The base is evaluated before the first update. A plain model then still is the base: nothing to force.
        actions = [BASE_TOKENS] * limit if bare_base and self.latent else []
        return Request(prompt, 0, 0.0, 0, limit, actions, self.endings.strings)

    async def _score(self, split: Split, indices: Sequence[int], texts: Sequence[str]) -> list[Reward]:
        items = [(split, index, text) for index, text in zip(indices, texts, strict=True)]
        if self.reward_model is None:
            return await asyncio.to_thread(self.rewards.score, items)
        problems = self.task.problems(split)
        asked = score_with(self.reward_model, [problems[index].question for index in indices], texts)
        if not self.weights:
            return await asked
        nothing = [Reward(0.0)] * len(items)
        own = asyncio.to_thread(self.rewards.score, items) if len(self.weights) > 1 else asyncio.sleep(0, nothing)
        pairs = zip(*await asyncio.gather(own, asked), strict=True)
        return [added(*pair, self.weights[REWARD_MODEL], REWARD_MODEL) for pair in pairs]

    def _trajectory(self, split: Split, index: int, completion: Completion, text: str, reward: Reward) -> Trajectory:
        return Trajectory(
            prompt_ids=np.asarray(self.prompts[split][index], np.int64),
            token_ids=completion.token_ids,
            actions=completion.actions,
            rollout_log_probs=completion.log_probs,
            versions=completion.versions,
            reward=reward.value,
            truncated=completion.truncated,
            text=text,
            failure=reward.failure,
            source=further(self.task.problems(split)[index])[1],
            parts=reward.parts,
            hidden_states=completion.hidden_states,
        )
