"""What runs in a rollout actor: an engine and a tokenizer, shared by all calls. Stateless but for weights and caches.

    EngineWorker     update_weights, sleep, and the RunningBatch that every call joins
      RolloutWorker  generate_groups, evaluate: problems with verifiable answers
      AgentWorker    play_episodes, speak, evaluate: multi-turn environments (rollout/agent.py)

    generate_groups ─┐                                          ┌─> completions ─> RewardProcess ─> Groups
    evaluate        ─┼─> arrivals ─> all that have come join, then a step, in a thread; and again
    update_weights  ─┘       gate: closed while an update waits for requests in flight (update_mode drain)

Calls overlap: the actor is asyncio. A failed step is the error of every call that waits on it.
"""

import asyncio
import functools
import math
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cola_ray.experience import Group, Ticket, Trajectory
from cola_ray.model.action_columns import BASE_TOKENS
from cola_ray.rollout.engine import Completion, Engine, LatentEngine, Request, TokenEngine, prepare_process
from cola_ray.rollout.isolation import Reward, RewardProcess
from cola_ray.rollout.judge import Judge, judged
from cola_ray.settings.config import Config
from cola_ray.tasks import make_prompts, make_task, stop_strings
from cola_ray.tasks.chat import ChatTokenizer
from cola_ray.tasks.endings import Endings
from cola_ray.tasks.protocol import Split
from cola_ray.weights import Bucket, Offer


class RunningBatch:
    """One engine that many callers share: whoever comes joins the batch before its next step.

    Args:
        drain: weights are swapped when all requests in flight have ended; else between two steps.
    """

    def __init__(self, engine: Engine, drain: bool) -> None:
        self.engine, self.drain = engine, drain
        self.gate = asyncio.Lock()  # held by a swap that drains, and by whoever joins, for a moment
        self.between_steps = asyncio.Lock()
        self.arrivals: list[tuple[Request, asyncio.Future[Completion]]] = []
        self.waiting: dict[str, asyncio.Future[Completion]] = {}
        self.runner: asyncio.Task | None = None
        self.stepper = ThreadPoolExecutor(1)  # one thread for all steps: OpenMP keeps a team for every caller

    async def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """They join in one go, so that who shares a batch with whom does not depend on timing.

        A caller that is cancelled takes its requests along: they leave the engine before its next step.
        """
        async with self.gate:
            arrivals = [(request, asyncio.get_running_loop().create_future()) for request in requests]
            self.arrivals += arrivals
            if self.runner is None or self.runner.done():
                self.runner = asyncio.create_task(self._run())
        return await asyncio.gather(*(future for _, future in arrivals))

    async def swap(self, load: Callable[[], None]) -> None:
        """Run ``load`` while the engine rests."""
        async with self.gate if self.drain else self.between_steps:
            if self.drain and self.runner is not None:
                await self.runner
            await asyncio.get_running_loop().run_in_executor(self.stepper, load)

    async def _run(self) -> None:
        """Step until nothing is in flight and nobody waits to be."""
        try:
            while self.arrivals or self.engine.num_in_flight:
                async with self.between_steps:
                    self._forget_cancelled()
                    self._admit()
                    if not self.engine.num_in_flight:
                        continue
                    finished = await asyncio.get_running_loop().run_in_executor(self.stepper, self.engine.step)
                for name, completion in finished.items():
                    future = self.waiting.pop(name)
                    if not future.done():  # cancelled within the step
                        future.set_result(completion)
        except Exception as error:
            futures = [*self.waiting.values(), *(future for _, future in self.arrivals)]
            self.waiting, self.arrivals = {}, []
            for future in futures:
                if not future.done():
                    future.set_exception(error)

    def _forget_cancelled(self) -> None:
        self.arrivals = [(request, future) for request, future in self.arrivals if not future.done()]
        for name in [name for name, future in self.waiting.items() if future.done()]:
            del self.waiting[name]
            self.engine.abort(name)

    def _admit(self) -> None:
        """All arrivals: many episodes end a turn in one step, and the next step has all their next turns."""
        arrivals, self.arrivals = self.arrivals, []
        for request, future in arrivals:
            try:
                self.waiting[self.engine.submit(request)] = future
            except Exception as error:  # refused: the others go on
                future.set_exception(error)


class EngineWorker:
    """An engine whose weights follow the learner's. A plain class; the driver makes its heirs Ray actors."""

    def __init__(self, config: Config, model_path: str, keep_hidden_states: bool) -> None:
        prepare_process(config.cluster.threads_per_process)
        from transformers import AutoTokenizer

        rollout = config.rollout
        self.config = config
        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.chat = ChatTokenizer(self.tokenizer, config.data.date)
        self.endings = Endings.of(self.tokenizer, model_path, [*rollout.stop, *stop_strings(config.task)])
        self.latent = config.rl.action_space == "latent"
        beta = config.rl.kl_coef if config.rl.actor_free else 0.0
        make: Callable[..., Engine] = (
            functools.partial(LatentEngine, keep_hidden_states=keep_hidden_states, soft_q_beta=beta)
            if self.latent
            else functools.partial(TokenEngine, adapters=config.rl.lora_rank > 0)
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
            enable_sleep_mode=config.cluster.colocated,
        )
        self.batch = RunningBatch(self.engine, drain=config.rl.update_mode == "drain")

    @property
    def num_actions(self) -> int:
        """Codes of the served checkpoint, or tokens of a plain Llama."""
        served = self.engine.llm.llm_engine.model_config.hf_config
        return int(served.num_actions if self.latent else served.vocab_size)

    async def facts(self) -> dict[str, object]:
        """What the driver wants to know once: sizes and versions."""
        import vllm

        return {
            "pad_token_id": self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            "vllm_version": vllm.__version__,
        }

    async def update_weights(self, version: int, *buckets: Bucket) -> int:
        """Hold ``version`` on return. Mode drain lets requests in flight end first; continue swaps between steps."""
        await self.batch.swap(lambda: self.engine.update_weights(version, buckets))
        return version

    async def receive_weights(self, offer: Offer) -> int:
        """The same by broadcast, together with all other members of the offer's channel."""
        await self.batch.swap(lambda: self.engine.receive_weights(offer))
        return offer.version

    async def sleep(self) -> None:
        self.engine.sleep()

    async def wake_up(self) -> None:
        self.engine.wake_up()

    async def peak_memory_gb(self) -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def _seed(self, *place: int) -> int:
        """Of a request's draws: depends on the run's seed and ``place`` alone."""
        return int(np.random.SeedSequence((self.config.seed, *place)).generate_state(1, np.uint64)[0] >> 2)


class RolloutWorker(EngineWorker):
    """Turns problem indices into scored groups.

    Args:
        judge: says what responses are worth, in place of the task's verifier.
    """

    def __init__(self, config: Config, model_path: str, judge: Judge | None = None) -> None:
        self.judge = judge
        if judge is None:
            make = functools.partial(make_task, config.task, config.seed)
            self.rewards = RewardProcess(make, config.task.reward_timeout_s)
        super().__init__(config, model_path, config.rl.cache_hidden_states)
        self.task = make_prompts(config.task, config.seed)
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
        }

    async def generate_groups(self, tickets: Sequence[Ticket]) -> list[Group]:
        """A group of ``rl.group_size`` scored completions for each ticket, in order.

        Draws depend on (run seed, ticket's position, sibling) alone, so who generates a group, when, and how often
        does not matter.
        """
        indices = [self.fitting["train"][ticket.problem] for ticket in tickets]
        size = self.config.rl.group_size
        asked = size + self.config.algorithm.greedy  # the last of them greedily
        requests = [
            self._request(self.prompts["train"][index], self._seed(ticket.position, sibling), greedy=sibling == size)
            for ticket, index in zip(tickets, indices, strict=True)
            for sibling in range(asked)
        ]
        completions = await self.batch.complete(requests)
        owners = [index for index in indices for _ in range(asked)]
        texts = self._texts([completion.token_ids for completion in completions])
        rewards = await self._score("train", owners, texts)
        made = [self._trajectory(*one) for one in zip(owners, completions, texts, rewards, strict=True)]
        groups = [made[start : start + asked] for start in range(0, len(made), asked)]
        return [
            Group(ticket.position, tuple(group[:size]), *group[size:])
            for ticket, group in zip(tickets, groups, strict=True)
        ]

    def _request(self, prompt: Sequence[int], seed: int, greedy: bool) -> Request:
        rollout = self.config.rollout
        temperature, top_k = (0.0, 0) if greedy else (rollout.temperature, rollout.top_k)
        return Request(prompt, seed, temperature, top_k, rollout.max_new_tokens, stop=self.endings.strings)

    async def evaluate(self, indices: Sequence[int], bare_base: bool) -> list[float]:
        """Greedy rewards on held-out problems that fit, of the policy or of the bare base; NaN where scoring failed."""
        problems = [self.fitting["heldout"][index] for index in indices]
        requests = [self._greedy_request(self.prompts["heldout"][problem], bare_base) for problem in problems]
        completions = await self.batch.complete(requests)
        texts = self._texts([completion.token_ids for completion in completions])
        scored = await self._score("heldout", problems, texts)
        return [math.nan if reward.failure else reward.value for reward in scored]

    def _greedy_request(self, prompt: Sequence[int], bare_base: bool = False) -> Request:
        limit = self.config.rollout.max_new_tokens
        # Before the first update a plain base is its own start.
        actions = [BASE_TOKENS] * limit if bare_base and self.latent else []
        return Request(prompt, 0, 0.0, 0, limit, actions, self.endings.strings)

    async def _score(self, split: Split, indices: Sequence[int], texts: Sequence[str]) -> list[Reward]:
        if self.judge is not None:
            problems = self.task.problems(split)
            return await judged(self.judge, [problems[index].question for index in indices], texts)
        items = [(split, index, text) for index, text in zip(indices, texts, strict=True)]
        return await asyncio.to_thread(self.rewards.score, items)

    def _trajectory(self, index: int, completion: Completion, text: str, reward: Reward) -> Trajectory:
        return Trajectory(
            prompt_ids=np.asarray(self.prompts["train"][index], np.int64),
            token_ids=completion.token_ids,
            actions=completion.actions,
            rollout_log_probs=completion.log_probs,
            versions=completion.versions,
            reward=reward.value,
            truncated=completion.truncated,
            text=text,
            failure=reward.failure,
            hidden_states=completion.hidden_states,
        )

    def _texts(self, responses: Sequence[np.ndarray]) -> list[str]:
        return [self.endings.text(response) for response in responses]
