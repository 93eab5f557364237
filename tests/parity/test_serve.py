"""``cola_ray serve`` under OpenAI's own client: the answers of ``generate``, and refusals in words."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import openai
import pytest
import torch
from conftest import VOCAB_SIZE, words

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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (folder / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "cola_ray", "serve", str(folder), "--port", str(port), "--host", "127.0.0.1",
         "--served-model-name", "cola", "--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "16"],
        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
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


def test_seeds_temperature_and_top_k_are_those_of_actions(client, cola, tokenizer):
    for i, row in enumerate(prompts()[:8]):
        seed, temperature, top_k = 100 + i, [1.0, 0.7][i % 2], [0, 4][i // 2 % 2]
        said = client.completions.create(
            model="cola", prompt=row, max_tokens=NEW, temperature=temperature, seed=seed, extra_body={"top_k": top_k}
        )
        drawn = ActionRequest.from_params({}, seed).seed
        tokens, _, _ = cola.generate_latent(
            torch.tensor([row]),
            max_new_tokens=NEW,
            temperature=temperature,
            top_k=top_k,
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


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9}, {"min_p": 0.1}, {"presence_penalty": 0.5}, {"frequency_penalty": 0.5},
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
