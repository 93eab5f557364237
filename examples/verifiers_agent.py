"""An environment of Prime Intellect's verifiers as an agent program: its own rollouts, scored by its own rubric.

cola_ray agent --task.name program --model.path MODEL \
    --task.command "VENV/bin/python examples/verifiers_agent.py ENVIRONMENT ['{\"argument\": value}']"

ENVIRONMENT is an argument of vf.load_environment, or a file with a function load_environment. VENV is a virtual
environment with verifiers>=0.1.14,<0.4. A seed stands for a row of the data set; held-out seeds, from 2^30 on, stand
for rows of the evaluation data set.
"""

import asyncio
import json
import pathlib
import sys

import verifiers as vf
from openai import AsyncOpenAI
from verifiers.clients import OpenAIChatCompletionsClient

HELD_OUT = 2**30
CUT = ("prompt_too_long", "timeout_reached")  # the episode would have continued
ENDS = ("task.options.max_turns", "EmptyModelResponseError")  # errors to verifiers, but the policy did answer


async def play(env, policy, seed):
    """Raises RuntimeError if the environment or the policy fails, so that the episode counts as failed."""
    rows = env.get_eval_dataset() if seed >= HELD_OUT else env.get_dataset()
    row = rows[seed % HELD_OUT % len(rows)]
    output = await env.run_rollout(row, OpenAIChatCompletionsClient(policy), model="policy", sampling_args={})
    error = str(output.get("error") or "")
    if error and not any(end in error for end in ENDS):
        raise RuntimeError(f"row {row['example_id']}: {error}")
    cut = True if output["stop_condition"] in CUT else None
    await policy.post("/reward", body={"reward": output["reward"], "truncated": cut}, cast_to=object)


async def play_on(env, client):
    while True:
        episode = await client.post("/episodes", body={}, cast_to=object)
        try:
            await play(env, client.copy(base_url=episode["base_url"]), episode["seed"])
        except Exception as error:  # this episode fails, the others continue
            print(f"{type(error).__name__}: {error}", flush=True)


async def main(name, arguments="{}"):
    file = pathlib.Path(name)
    if file.suffix == ".py":
        sys.path.insert(0, str(file.parent))
        name = file.stem
    env = vf.load_environment(name, **json.loads(arguments))
    if env.requires_group_rollouts:
        sys.exit(f"{name}: its rubric scores rollouts of a row together, and an episode is scored by itself")
    client = AsyncOpenAI(timeout=None)
    await asyncio.gather(*(play_on(env, client) for _ in range(64)))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
