"""What runs in a rollout actor: an engine, a tokenizer and a task. Stateless but for weights and caches."""

import resource
from collections.abc import Sequence

import numpy as np

from cola_ray.config import Config
from cola_ray.experience import Group, Trajectory
from cola_ray.model.action_columns import BASE_TOKENS
from cola_ray.rollout.engine import Completion, LatentEngine, Request, prepare_process
from cola_ray.tasks import make_task, render_prompt
from cola_ray.weights import Bucket


class RolloutWorker:
    """Turns problem indices into scored groups. A plain class; the driver makes it a Ray actor."""

    def __init__(self, config: Config, model_path: str) -> None:
        prepare_process(config.cluster.threads_per_process)
        from transformers import AutoTokenizer

        rollout = config.rollout
        self.config = config
        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.task = make_task(config.task, config.seed)
        self.engine = LatentEngine(
            model_path,
            dtype=config.model.dtype,
            max_model_len=rollout.max_prompt_tokens + rollout.max_new_tokens,
            stop_token_id=self.tokenizer.eos_token_id,
            max_num_seqs=rollout.max_num_seqs,
            kv_cache_mb=rollout.kv_cache_mb,
            tensor_parallel_size=rollout.tensor_parallel_size,
            num_threads=config.cluster.threads_per_process,
        )

    def facts(self) -> dict[str, object]:
        """What the driver wants to know once: sizes and versions."""
        import vllm

        return {
            "num_train": len(self.task.problems("train")),
            "num_heldout": len(self.task.problems("heldout")),
            "pad_token_id": self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            "vllm_version": vllm.__version__,
        }

    def generate_groups(self, indices: Sequence[int], round_number: int) -> list[Group]:
        """One group of ``rl.group_size`` completions for each training problem, scored.

        Seeds depend on (run seed, round, problem, sibling) alone, so who generates a group and when does not matter.
        A prompt longer than ``rollout.max_prompt_tokens`` yields a group without trajectories.
        """
        size, rollout = self.config.rl.group_size, self.config.rollout
        problems = self.task.problems("train")
        prompts = {index: render_prompt(self.tokenizer, problems[index].question) for index in indices}
        fitting = [index for index in indices if len(prompts[index]) <= rollout.max_prompt_tokens]
        requests = [
            Request(
                prompts[index],
                seed=self._seed(round_number, index, sibling),
                temperature=rollout.temperature,
                top_k=rollout.top_k,
                max_new_tokens=rollout.max_new_tokens,
            )
            for index in fitting
            for sibling in range(size)
        ]
        completions = iter(self.engine.generate(requests))
        return [
            Group(
                index,
                tuple(self._scored(index, prompts[index], next(completions)) for _ in range(size))
                if index in fitting
                else (),
            )
            for index in indices
        ]

    def evaluate(self, indices: Sequence[int], bare_base: bool) -> list[float]:
        """Greedy rewards on held-out problems: of the policy, or of the bare base."""
        rollout = self.config.rollout
        problems = self.task.problems("heldout")
        prompts = [render_prompt(self.tokenizer, problems[index].question) for index in indices]
        actions = [BASE_TOKENS] * rollout.max_new_tokens if bare_base else []
        requests = [
            Request(prompt[-rollout.max_prompt_tokens :], 0, 0.0, 0, rollout.max_new_tokens, actions)
            for prompt in prompts
        ]
        completions = self.engine.generate(requests)
        return [
            self.task.score("heldout", index, self._text(completion.token_ids))
            for index, completion in zip(indices, completions, strict=True)
        ]

    def update_weights(self, version: int, *buckets: Bucket) -> int:
        self.engine.update_weights(version, buckets)
        return version

    def peak_memory_gb(self) -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def _scored(self, index: int, prompt: Sequence[int], completion: Completion) -> Trajectory:
        text = self._text(completion.token_ids)
        return Trajectory(
            prompt_ids=np.asarray(prompt, np.int64),
            token_ids=completion.token_ids,
            actions=completion.actions,
            rollout_log_probs=completion.log_probs,
            versions=np.full(len(completion.actions), self.engine.version, np.int64),
            reward=self.task.score("train", index, text),
            truncated=completion.truncated,
            text=text,
        )

    def _text(self, token_ids: np.ndarray) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def _seed(self, round_number: int, index: int, sibling: int) -> int:
        entropy = (self.config.seed, round_number, index, sibling)
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 2)
