"""Tool calls in the model's text, found by one of vLLM's parsers."""

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cola_ray.rollout.program_requests import RefusedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
Tools = Sequence[Mapping[str, Any]]


class ToolCalls:
    """Finds tool calls; one instance serves all conversations of a worker.

    vLLM's parsers hold the state of a stream, so each text gets a parser of its own. Slow work is done once: a parser
    reads the whole vocabulary when it is made (a second for 150 000 tokens), and tools are validated.

    Args:
        parser: the name of one of vLLM's parsers.

    Raises:
        ValueError: the parser is not for this model.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", parser: str) -> None:
        from vllm.tokenizers.hf import get_cached_tokenizer
        from vllm.tool_parsers import ToolParserManager

        self.tokenizer = get_cached_tokenizer(tokenizer)  # type: ignore[arg-type]
        self.make = ToolParserManager.get_tool_parser(parser)
        self.asked = functools.lru_cache(maxsize=64)(_asked)
        try:
            self.make(self.tokenizer)
        except Exception as error:
            raise ValueError(f"task.tool_parser = {parser!r}: not for this model's tokenizer: {error}") from None

    def check(self, tools: Tools) -> None:
        """Raises RefusedError if the tools do not follow OpenAI's API."""
        try:
            self.asked(json.dumps(tools))
        except Exception as error:  # not all of vLLM's errors are ValueErrors
            raise RefusedError(f"tools: {' '.join(str(error).split()):.200}") from None

    def within(self, text: str, tools: Tools) -> dict[str, Any]:
        """A message's content and tool calls; {} if there are none, or none that can be parsed."""
        asked = self.asked(json.dumps(tools))
        try:
            found = self.make(self.tokenizer, asked.tools).extract_tool_calls(text, asked)
        except Exception as error:  # a text may contain anything, and not all parsers cope with that
            log.warning("a tool call cannot be parsed: %s: %s", type(error).__name__, error)
            return {}
        if not found.tools_called:
            return {}
        return {"content": found.content or None, "tool_calls": [call.model_dump() for call in found.tool_calls]}


def _asked(tools: str) -> Any:
    """A request with only its tools, as parsers read it."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    return ChatCompletionRequest.model_validate({"messages": [], "model": "", "tools": json.loads(tools)})
