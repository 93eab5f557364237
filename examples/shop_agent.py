"""The shop as an agent program: it talks to the policy through OpenAI's API, and plays many episodes at once.

cola_ray agent --task.name program --task.command "python examples/shop_agent.py" --model.path MODEL

An argument on the command line becomes a system message, for models that do not know the shop: "Answer with one action
alone: search[words] on the first page, elsewhere click[value] of a value in brackets".
"""

import asyncio
import sys

from openai import APIError, AsyncOpenAI, BadRequestError

from cola_ray.tasks.shop import Shop

RULES = [{"role": "system", "content": said} for said in sys.argv[1:]]
OLDEST = slice(len(RULES) + 1, len(RULES) + 3)


async def say(policy, messages):
    """The policy's next message. A conversation that is too long loses its oldest turns, but never its opening."""
    while True:
        try:
            return (await policy.chat.completions.create(model="policy", messages=messages)).choices[0].message
        except BadRequestError as error:
            if error.code != "context_length_exceeded" or not messages[OLDEST]:
                raise
            del messages[OLDEST]


async def play(policy, seed):
    shop, done = Shop(), False
    page, _ = shop.reset(seed=seed)
    messages = [*RULES, {"role": "user", "content": page}]
    while not done:
        messages.append(await say(policy, messages))
        page, reward, terminated, truncated, _ = shop.step(messages[-1].content)
        messages.append({"role": "user", "content": page})
        done = terminated or truncated
    await policy.post("/reward", body={"reward": reward, "truncated": truncated}, cast_to=object)


async def play_on(client):
    while True:
        episode = await client.post("/episodes", body={}, cast_to=object)
        try:
            await play(client.copy(base_url=episode["base_url"]), episode["seed"])
        except APIError as error:  # this episode fails, the others continue
            print(error)


async def main():
    client = AsyncOpenAI(timeout=None)
    await asyncio.gather(*(play_on(client) for _ in range(64)))


asyncio.run(main())
