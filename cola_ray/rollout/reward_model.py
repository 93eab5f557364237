"""Rewards for responses without a verifiable answer: from a sequence classifier, or from an HTTP endpoint.

RolloutWorker._score ─> score_with(RewardFunction) ─┬─> RewardModel, on an actor of its own, shared by all workers
                                                    └─> RewardEndpoint: POST {"prompts", "responses"} ─> {"rewards"}
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence

import httpx
import tenacity
import torch

from cola_ray.rollout.isolation import Reply
from cola_ray.rollout.reward_process import Reward, as_reward
from cola_ray.runs.redaction import redacted
from cola_ray.sandbox.messages import as_text
from cola_ray.tasks.chat import ChatTokenizer, Prompt

RewardFunction = Callable[[Sequence[Prompt], Sequence[str]], Awaitable[list[float]]]
"""(prompts, responses) -> one reward per response."""

_ANSWER_BYTES = 1 << 16  # size limit of an endpoint's answer, to which each reward adds:
_BYTES_PER_REWARD = 1024


async def score_with(
    reward_function: RewardFunction, prompts: Sequence[Prompt], responses: Sequence[str]
) -> list[Reward]:
    """Return one reward per response: all failures if the function raises, a failure for each invalid number."""
    try:
        values = await reward_function(prompts, responses)
    except Exception as error:
        return [Reward(0.0, as_text(f"the reward model: {type(error).__name__}: {error}", 300))] * len(responses)
    return [as_reward(Reply(value)) for value in values]


class RewardModel:
    """A Hugging Face sequence classifier; its first logit is the reward.

    Args:
        path: directory or hub id.
        max_tokens: longer conversations are cut at their beginning.
        date: shown by chat templates that have one.
        batch_size: conversations per forward pass.
        num_threads: CPU threads.
    """

    def __init__(self, path: str, max_tokens: int, date: str = "", batch_size: int = 64, num_threads: int = 1) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        torch.set_num_threads(num_threads)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.chat = ChatTokenizer(self.tokenizer, date)
        self.model = AutoModelForSequenceClassification.from_pretrained(path, dtype="auto").eval().to(self.device)
        self.text_config = self.model.config.get_text_config()
        self.padding: int | None = self.text_config.pad_token_id
        self.max_tokens, self.batch_size = max_tokens, batch_size
        self.one_at_a_time = asyncio.Lock()

    async def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return one reward per response."""
        async with self.one_at_a_time:
            return await asyncio.to_thread(self._score, prompts, responses)

    @torch.inference_mode()
    def _score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        pairs = zip(prompts, responses, strict=True)
        rows = [self.chat.exchange_ids(prompt, response)[-self.max_tokens :] for prompt, response in pairs]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # rows of similar length share a forward pass
        rewards = [0.0] * len(rows)
        for start in range(0, len(rows), self.batch_size):
            some = order[start : start + self.batch_size]
            logits = self.model(**self._batch([rows[i] for i in some])).logits[:, 0]
            for i, reward in zip(some, logits.float().tolist(), strict=True):
                rewards[i] = reward
        return rewards

    def _batch(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Pad on the right. A decoder's classifier reads the last token that is not its padding token."""
        pad = self.padding
        if pad is None:  # choose a token that no row contains, so that every row is read at its own end
            pad = min(set(range(self.text_config.vocab_size)).difference(*rows))
            self.text_config.pad_token_id = pad
        ids = torch.full((len(rows), max(map(len, rows))), pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}


class RewardEndpoint:
    """An HTTP endpoint that takes ``{"prompts": [...], "responses": [...]}`` and answers ``{"rewards": [...]}``.

    A prompt is text, or a list of chat messages if the rows have those. If the connection fails, the time is up or the
    server reports an internal error (status 500 and above), the request is repeated for up to a minute. Any other
    answer that does not hold one reward per response is an error at once.

    Args:
        url: the endpoint's.
        timeout_s: seconds that one request may take in all.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url, self.timeout_s = url, timeout_s
        self.name = redacted(url)

    async def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((httpx.TransportError, TimeoutError, _ServerError)),
            wait=tenacity.wait_exponential(max=10),
            stop=tenacity.stop_after_delay(60),
            reraise=True,
        )
        body = json.dumps({"prompts": list(prompts), "responses": list(responses)}).encode()
        content: bytes = await retrying(self._post, body, _ANSWER_BYTES + _BYTES_PER_REWARD * len(responses))
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            raise ValueError(f"{self.name} answered {content[:100]!r}, which is not JSON") from None
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list) or len(rewards) != len(responses):
            expected = f"{{'rewards': [{len(responses)} numbers]}}"
            raise ValueError(f"{self.name} answered {str(answer)[:100]!r}, not {expected}")
        return rewards

    async def _post(self, body: bytes, max_bytes: int) -> bytes:
        """Return the answer's body. It is never decompressed: a decompressed body could have any size."""
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        content = b""
        try:
            async with (
                asyncio.timeout(self.timeout_s),
                httpx.AsyncClient(timeout=None, follow_redirects=True) as client,
                client.stream("POST", self.url, content=body, headers=headers) as response,
            ):
                if not response.is_success:
                    error = _ServerError if response.is_server_error else ValueError
                    raise error(f"{self.name} answered {response.status_code} {response.reason_phrase}".rstrip())
                async for chunk in response.aiter_raw():
                    content += chunk
                    if len(content) > max_bytes:
                        raise ValueError(f"{self.name} answered more than {max_bytes} bytes")
        except TimeoutError:
            raise TimeoutError(f"{self.name} took longer than {self.timeout_s:g} s") from None
        return content


class _ServerError(Exception):
    """A status of 500 or above; the same request may succeed later."""
