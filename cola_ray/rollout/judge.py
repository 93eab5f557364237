"""Who says what responses to open prompts are worth: a sequence classifier, or an endpoint that somebody runs.

RolloutWorker._score ─> Judge(prompts, responses) ─┬─> RewardModel, on an actor of its own, shared by all workers
                                                   └─> HttpJudge: POST {"prompts", "responses"} ─> {"rewards"}
"""

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Sequence

import tenacity
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cola_ray.rollout.isolation import Answer, Reward, as_reward
from cola_ray.sandbox.messages import as_text
from cola_ray.tasks.chat import ChatTokenizer, Prompt

Judge = Callable[[Sequence[Prompt], Sequence[str]], Awaitable[list[float]]]
"""(prompts, responses) -> a reward each."""

_MOST_BYTES = 1 << 16  # of an endpoint's answer, beside a kilobyte a response


async def judged(judge: Judge, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Reward]:
    """A reward a response; failures, all of them, where the judge cannot be reached or answers nonsense."""
    try:
        values = await judge(prompts, responses)
    except Exception as error:
        return [Reward(0.0, as_text(f"the reward model: {type(error).__name__}: {error}", 300))] * len(responses)
    return [as_reward(Answer(value)) for value in values]


class RewardModel:
    """A Hugging Face sequence classifier; its first logit is the reward.

    Args:
        path: directory or hub id.
        max_tokens: longer conversations lose their beginning.
        date: for a chat template that shows one.
        batch_size: conversations in a forward pass.
    """

    def __init__(self, path: str, max_tokens: int, date: str = "", batch_size: int = 64, num_threads: int = 1) -> None:
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
        async with self.one_at_a_time:
            return await asyncio.to_thread(self._score, prompts, responses)

    @torch.inference_mode()
    def _score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        pairs = zip(prompts, responses, strict=True)
        rows = [self.chat.judged_ids(prompt, response)[-self.max_tokens :] for prompt, response in pairs]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # like lengths share a pass
        rewards = [0.0] * len(rows)
        for start in range(0, len(rows), self.batch_size):
            some = order[start : start + self.batch_size]
            logits = self.model(**self._batch([rows[i] for i in some])).logits[:, 0]
            for i, reward in zip(some, logits.float().tolist(), strict=True):
                rewards[i] = reward
        return rewards

    def _batch(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Padded on the right. A decoder's classifier reads the last token that is not its padding."""
        pad = self.padding
        if pad is None:  # one that no row contains, so that each is read at its own end
            pad = min(set(range(self.text_config.vocab_size)).difference(*rows))
            self.text_config.pad_token_id = pad
        ids = torch.full((len(rows), max(map(len, rows))), pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}


class HttpJudge:
    """An endpoint that takes ``{"prompts": [...], "responses": [...]}`` and answers ``{"rewards": [...]}``.

    A prompt is text, or a list of chat messages where the rows have those.

    A refused or broken connection is tried again for a minute; an answer of another form is an error at once.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url, self.timeout_s = url, timeout_s

    async def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        patience = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_may_pass),
            wait=tenacity.wait_exponential(max=10),
            stop=tenacity.stop_after_delay(60),
            reraise=True,
        )
        return await patience(asyncio.to_thread, self._ask, list(prompts), list(responses))

    def _ask(self, prompts: list[Prompt], responses: list[str]) -> list[float]:
        body = json.dumps({"prompts": prompts, "responses": responses}).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        deadline, heard = time.monotonic() + self.timeout_s, b""
        most = _MOST_BYTES + 1024 * len(responses)
        with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
            while more := answer.read1(1 << 16):
                heard += more
                if len(heard) > most:
                    raise ValueError(f"{self.url} answered more than {most} bytes to {len(responses)} responses")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self.url} took longer than {self.timeout_s:g} s")
        try:
            said = json.loads(heard)
        except (ValueError, RecursionError):
            raise ValueError(f"{self.url} answered {heard[:100]!r}, which is no JSON") from None
        rewards = said.get("rewards") if isinstance(said, dict) else None
        if not isinstance(rewards, list) or len(rewards) != len(responses):
            raise ValueError(f"{self.url} answered {str(said)[:100]!r}, not {{'rewards': [{len(responses)} numbers]}}")
        return rewards


def _may_pass(error: BaseException) -> bool:
    """What another try may mend: no connection, a time-out, a server's own error."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500
    return isinstance(error, (urllib.error.URLError, TimeoutError, ConnectionError))
