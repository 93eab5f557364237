"""``cola_ray serve`` with OpenAI's own client: answers as of ``generate``, and refusals with an explanation."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import openai
import pytest
import torch
from conftest import VOCAB_SIZE, free_port, words

from cola_ray.model.action_requests import ActionRequest
from cola_ray.serve import chat_template
from cola_ray.tasks.chat import ChatTokenizer

NEW = 8
TOLERANCE = 3e-3  # float32 logits of up to 350 from sums of 64 terms: 350 * 64 * 1.2e-7


@pytest.fixture(scope="module")
def tokenizer():
    return words(unk_token="<s>")


@pytest.fixture(scope="module")
def client(cola, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    cola.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    port = free_port()
    log = (folder / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "cola_ray", "serve", str(folder), "--port", str(port), "--host", "127.0.0.1",
         "--served-model-name", "cola", "--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "16"],
        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},  # other tests' engines have switched it off here
    )  # fmt: skip
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
    try:
        for _ in range(360):
            assert server.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(0.5)
        yield client
    finally:
        for how in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(20)


def prompts():
    draw = torch.Generator().manual_seed(11)
    return [torch.randint(3, VOCAB_SIZE, (2 + i % 6,), generator=draw).tolist() for i in range(24)]


def text(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True).split()


def test_greedy_answers_are_those_of_generate(client, cola, tokenizer):
    asked = prompts()
    said = client.completions.create(model="cola", prompt=asked, max_tokens=NEW, temperature=0).choices
    for row, choice in zip(asked, said, strict=True):
        made = cola.generate(torch.tensor([row]), max_new_tokens=NEW)[0, len(row) :]
        assert choice.text.split() == text(tokenizer, made)
    streamed = client.completions.create(model="cola", prompt=asked[0], max_tokens=NEW, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in streamed).split() == said[0].text.split()


def test_seeds_temperature_top_k_and_top_p_are_those_of_actions(client, cola, tokenizer):
    for i, row in enumerate(prompts()[:8]):
        seed, temperature, top_k, top_p = 100 + i, [1.0, 0.7][i % 2], [0, 4][i // 2 % 2], [1.0, 0.5][i // 4 % 2]
        said = client.completions.create(
            model="cola", prompt=row, max_tokens=NEW, temperature=temperature, seed=seed, top_p=top_p,
            extra_body={"top_k": top_k},
        )  # fmt: skip
        drawn = ActionRequest.from_params({}, seed).seed
        tokens, _, _ = cola.generate_latent(
            torch.tensor([row]),
            max_new_tokens=NEW,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=drawn,
            eos_token_id=2,
        )
        assert said.choices[0].text.split() == text(tokenizer, tokens[0])
    one = [client.completions.create(model="cola", prompt=[5, 6], max_tokens=NEW, n=4, seed=7) for _ in range(2)]
    first, again = ([choice.text for choice in found.choices] for found in one)
    assert first == again
    assert len(set(first)) > 1
    free = client.completions.create(model="cola", prompt=[5, 6], max_tokens=NEW, n=8).choices
    assert len({choice.text for choice in free}) > 1, "without a seed every completion has its own"


def test_log_probabilities_are_of_tokens_given_the_action(client, cola, tokenizer):
    row = prompts()[3]
    found = client.completions.create(model="cola", prompt=row, max_tokens=4, temperature=1, seed=5, logprobs=3)
    choice = found.choices[0].logprobs
    made, actions, _ = cola.generate_latent(
        torch.tensor([row]), max_new_tokens=4, seed=ActionRequest.from_params({}, 5).seed, eos_token_id=2
    )
    e = cola.encode(torch.tensor([row + made[0].tolist()]))[0, len(row) - 1 : -1]
    expected = cola.world_model_logits(e, actions[0].clamp_min(0)).log_softmax(-1).detach()
    for step, score in enumerate(choice.token_logprobs):
        assert score == pytest.approx(float(expected[step, made[0, step]]), abs=TOLERANCE)
        best = expected[step].topk(3)
        told = sorted(choice.top_logprobs[step].values(), reverse=True)[:3]
        assert told == pytest.approx(best.values.tolist(), abs=TOLERANCE)
        assert all(name in tokenizer.get_vocab() for name in map(str.strip, choice.top_logprobs[step])), "no columns"


def test_stops_and_biases_act_on_tokens(client, cola, tokenizer):
    best = {tuple(row): cola(torch.tensor([row])).logits[0, -1].topk(2).values for row in prompts()}
    row = list(next(row for row, (first, second) in best.items() if 1 < first - second < 90))  # a bias is -100 at most
    whole = client.completions.create(model="cola", prompt=row, max_tokens=NEW, temperature=0).choices[0].text.split()
    stopped = client.completions.create(model="cola", prompt=row, max_tokens=NEW, temperature=0, stop=[whole[1]])
    assert stopped.choices[0].text.split() == whole[:1]
    assert stopped.choices[0].finish_reason == "stop"
    first = tokenizer.convert_tokens_to_ids(whole[0])
    other = client.completions.create(
        model="cola", prompt=row, max_tokens=1, temperature=0, logit_bias={str(first): -100}
    )
    expected = cola.generate(torch.tensor([row]), max_new_tokens=1, suppress_tokens=[first])[0, -1:]
    assert other.choices[0].text.split() == text(tokenizer, expected)


def test_chat_reads_conversations_as_training_does(client, cola, tokenizer):
    for messages in (
        [{"role": "user", "content": "w5 w6 w7"}],
        [{"role": "system", "content": "w9"}, {"role": "user", "content": "w5 w6"}],
    ):
        ids = ChatTokenizer(tokenizer, "").prompt_ids(messages)
        made = cola.generate(torch.tensor([ids]), max_new_tokens=NEW)[0, len(ids) :]
        answer = client.chat.completions.create(model="cola", messages=messages, max_tokens=NEW, temperature=0)
        assert (answer.choices[0].message.content or "").split() == text(tokenizer, made)
    streamed = client.chat.completions.create(
        model="cola", messages=messages, max_tokens=NEW, temperature=0, stream=True
    )
    said = "".join(part.choices[0].delta.content or "" for part in streamed if part.choices)
    assert said.split() == text(tokenizer, made)


def generated(cola, row, seed, actions=None, **options):
    """Tokens, actions and log-probabilities, as lists."""
    forced = None if actions is None else torch.tensor([actions])
    found = cola.generate_latent(
        torch.tensor([row]), max_new_tokens=NEW, seed=ActionRequest.from_params({}, seed).seed, eos_token_id=2,
        actions=forced, **options,
    )  # fmt: skip
    tokens, taken, log_probs = (one[0].tolist() for one in found)
    count = tokens.index(2) + 1 if 2 in tokens else len(tokens)
    return tokens[:count], taken[:count], log_probs[:count]


def assert_told(told, expected):
    _, actions, log_probs = expected
    assert told["actions"] == actions
    assert told["log_probs"] == pytest.approx(log_probs, abs=TOLERANCE)


WANTED = {"cola": {"return_actions": True}}


def test_actions_come_back_where_they_are_asked_for(client, cola, tokenizer):
    for seed, row in enumerate(prompts()[:6]):
        ask = {"model": "cola", "prompt": row, "max_tokens": NEW, "temperature": 0.7, "seed": seed}
        (choice,) = client.completions.create(**ask, extra_body=WANTED).choices
        assert_told(choice.cola, expected := generated(cola, row, seed, temperature=0.7))
        assert choice.text.split() == text(tokenizer, expected[0])
        assert getattr(choice, "token_ids", None) is None, "which nobody asked for"
        (plain,) = client.completions.create(**ask).choices
        assert plain.text == choice.text
        assert not hasattr(plain, "cola")
    row, many = prompts()[0], {"model": "cola", "prompt": prompts()[0], "max_tokens": NEW, "n": 5, "extra_body": WANTED}
    said = client.completions.create(**many, seed=40, logprobs=1).choices
    for i, choice in enumerate(said):  # vLLM gives choice i the seed 40 + i
        assert_told(choice.cola, generated(cola, row, 40 + i))
        assert len(choice.logprobs.tokens) == len(choice.cola["actions"])
    free = client.completions.create(**many).choices
    assert len({tuple(choice.cola["actions"]) for choice in free}) > 1
    kept = client.completions.create(**many | {"extra_body": WANTED | {"return_token_ids": True}}, seed=40).choices
    assert [choice.token_ids for choice in kept] == [generated(cola, row, 40 + i)[0] for i in range(5)]


def test_actions_of_streams_come_at_their_end(client, cola, tokenizer):
    row = prompts()[1]
    ask = {"model": "cola", "max_tokens": NEW, "seed": 3, "n": 2, "stream": True, "extra_body": WANTED}
    *parts, last = client.completions.create(**ask, prompt=row)
    for i in range(2):
        tokens, *_ = expected = generated(cola, row, 3 + i)
        said = "".join(part.choices[0].text for part in parts if part.choices and part.choices[0].index == i)
        assert said.split() == text(tokenizer, tokens)
        assert_told(last.cola[i], expected)
    assert last.choices == []
    messages = [{"role": "user", "content": "w5 w6 w7"}]
    ids = ChatTokenizer(tokenizer, "").prompt_ids(messages)
    *_, last = client.chat.completions.create(**ask, messages=messages)
    for i in range(2):
        assert_told(last.cola[i], generated(cola, ids, 3 + i))
    (answer,) = client.chat.completions.create(**ask | {"stream": False, "n": 1}, messages=messages).choices
    assert_told(answer.cola, generated(cola, ids, 3))


def test_forced_actions_are_those_that_were_taken(client, cola, tokenizer):
    for row in prompts()[:3]:
        for given, forced in ((7, [7] * NEW), ([3, 5], [3, 5]), ([-1, 9, -1, 2], [-1, 9, -1, 2])):
            asked = {"cola": {"actions": given, "return_actions": True}}
            ask = {"model": "cola", "prompt": row, "max_tokens": NEW, "seed": 8}
            (choice,) = client.completions.create(**ask, extra_body=asked).choices
            padded = forced + [-1] * (NEW - len(forced))
            assert_told(choice.cola, expected := generated(cola, row, 8, padded))
            assert choice.text.split() == text(tokenizer, expected[0])
            taken = choice.cola["actions"]
            assert all(want in (-1, was) for want, was in zip(forced, taken, strict=False))
            (silent,) = client.completions.create(**ask, extra_body={"cola": {"actions": given}}).choices
            assert silent.text == choice.text
            assert not hasattr(silent, "cola")


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"cola": 3}, "cola = 3: give an object, with return_actions or actions"),
        ({"cola": {"action": 3}}, "cola.action: unknown; use return_actions or actions"),
        ({"cola": {"return_actions": 1}}, "cola.return_actions = 1: give true or false"),
        ({"cola": {"actions": 16}}, "cola.actions = 16: give an action from 0 to 15, or a list of them"),
        ({"cola": {"actions": True}}, "cola.actions = True: give an action from 0 to 15, or a list of them"),
        ({"cola": {"actions": [3, -2]}}, "cola.actions: -2 is none; give actions from 0 to 15, or -1"),
        ({"cola": {"actions": [3, "x"]}}, "cola.actions: 'x' is none; give actions from 0 to 15, or -1"),
        ({"cola": {"actions": [0] * 129}}, "cola.actions: 129 of them, and the model has 128 positions; give fewer"),
        ({"cola": {"return_actions": True}, "n": 2000}, "n = 2000: give a number from 1 to 1024"),
        ({"cola": {"return_actions": True}, "prompt": ["w5", "w6"]}, "prompt: a list of 2, and actions are returned"),
        ({"cola": {}, "vllm_xargs": {"action_slots": [0]}}, "vllm_xargs: a server takes no actions from its clients"),
    ],
    ids=lambda given: str(given)[:30],
)
def test_malformed_steering_is_refused_in_a_line(client, asked, line):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**{"model": "cola", "prompt": [5, 6], "max_tokens": 2, "extra_body": asked})
    assert refused.value.body["message"].startswith(line)
    assert "\n" not in refused.value.body["message"]


@pytest.mark.parametrize(
    "options",
    [
        {"min_p": 0.1}, {"presence_penalty": 0.5}, {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.2}, {"use_beam_search": True}, {"prompt_logprobs": 1}, {"echo": True, "logprobs": 1},
        {"vllm_xargs": {"actions": "3"}},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_what_has_no_meaning_over_actions_is_refused(client, options):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="cola", prompt=[5, 6], max_tokens=2, extra_body=options)
    assert any(word in str(refused.value) for word in ("CoLA draws", "latent action", "no actions"))
    assert client.completions.create(model="cola", prompt=[5, 6], max_tokens=1).choices, "the server goes on"


def test_a_tokenizer_with_a_template_keeps_it(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert "Assistant: " in chat_template(str(tmp_path))
    own = words()
    own.chat_template = "{{ messages[0].content }}"
    own.save_pretrained(tmp_path / "own")
    assert chat_template(str(tmp_path / "own")) is None


@pytest.mark.parametrize("kind", ["llama", "nowhere"])
def test_other_models_are_refused_before_anything_starts(base_dir, tmp_path, kind):
    folder = base_dir if kind == "llama" else tmp_path / "nowhere"
    run = subprocess.run(
        [sys.executable, "-m", "cola_ray", "serve", str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].startswith(f"model = {folder}: ")
