"""``vllm serve`` for a CoLA model, also where vLLM is installed under its CPU distribution's name, which vLLM's own
command does not find.

    cola_ray serve outputs/demo/model --port 8000 --served-model-name cola       # and any flag of vllm serve

Then any client of OpenAI's completions and chat completions. ``temperature`` (0 is greedy), ``top_k`` and ``seed`` are
those of latent actions; what has no meaning for them is refused with status 400. See
:class:`cola_ray.model.vllm_rows.RequestSampler`. Actions are returned and steered by ``extra_body``: serve_actions.py.
"""

import json
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cola_ray.model.action_requests import TAKES_ACTIONS, UNSERVED

if TYPE_CHECKING:
    from fastapi import Request, Response

ROLES_WRITTEN_OUT = """\
{{- bos -}}
{%- if messages | length == 1 and messages[0].role == "user" -%}
{{- messages[0].content -}}
{%- else -%}
{%- for message in messages -%}
{{- message.role | capitalize }}: {{ message.content }}{{ "" if loop.last else "\n" -}}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role != "assistant" -%}{{- "\nAssistant: " -}}{%- endif -%}
{%- endif -%}"""
"""The format of :class:`cola_ray.tasks.chat.ChatTokenizer` for a tokenizer without a template."""


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    import torch

    on_cpu = not torch.cuda.is_available()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="cola_ray serve", description=__doc__))
    if on_cpu:  # one process computes, in the blocks that vLLM's kernels take there
        parser.set_defaults(distributed_executor_backend="uni", enforce_eager=True, block_size=32,
                            kv_cache_memory_bytes=1 << 30)  # fmt: skip
    args = parser.parse_args(given)
    args.model = args.model_tag or args.model
    _check(args.model)
    if args.chat_template is None:
        args.chat_template = chat_template(args.tokenizer or args.model)
    args.middleware = [*args.middleware, f"{__name__}.refuse_beams", "cola_ray.serve_actions.ActionMiddleware"]
    args.worker_extension_cls = args.worker_extension_cls or "cola_ray.model.vllm_rows.ServedActions"
    os.environ[TAKES_ACTIONS] = "1"
    validate_parsed_serve_args(args)
    uvloop.run(run_server(args))


def _check(model: str) -> None:
    """Checks before anything heavy starts."""
    from transformers import AutoConfig

    import cola_ray  # noqa: F401

    if not Path(model).exists() and Path(model).is_absolute():
        sys.exit(f"model = {model}: no such folder; give a model's folder or hub id")
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        sys.exit(f"model = {model}: {str(error).splitlines()[0]}; give the folder of a CoLA model or its hub id")
    if config.model_type != "cola":
        sys.exit(f"model = {model}: is a {config.model_type} model; cola_ray serves CoLA models, vLLM itself others")
    if lasting := config.lasting:
        sys.exit(f"model = {model}: {UNSERVED} ({lasting}); use a model whose actions give one token each")


def chat_template(tokenizer_path: str) -> str | None:
    """The replacement for a missing chat template; None if the tokenizer has its own."""
    from transformers import AutoTokenizer

    from cola_ray.tasks.chat import ChatTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    if tokenizer.chat_template:
        return None
    begin = tokenizer.decode(ChatTokenizer(tokenizer, "").begin)
    return f"{{%- set bos = {json.dumps(begin)} -%}}" + ROLES_WRITTEN_OUT


async def refuse_beams(request: "Request", call_next: Callable[[Any], Awaitable["Response"]]) -> "Response":
    """HTTP middleware: beam search over tokens has no meaning here, and vLLM starts it before it checks sampling."""
    from fastapi.responses import JSONResponse

    if request.method == "POST" and request.headers.get("content-type", "").startswith("application/json"):
        try:
            body = json.loads(await request.body())
        except ValueError:
            body = None  # vLLM's to refuse
        if isinstance(body, dict) and body.get("use_beam_search"):
            message = "use_beam_search: beams rank tokens by probability, and CoLA draws latent actions; use n instead"
            error = {"message": message, "type": "BadRequestError", "param": "use_beam_search", "code": 400}
            return JSONResponse({"error": error}, status_code=400)
    return await call_next(request)
