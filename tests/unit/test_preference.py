"""Preference pairs, the reward model they make, and the endpoint that may take its place."""

import asyncio
import http.server
import json
import threading

import numpy as np
import pytest
import torch
from conftest import small_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from cola_ray.learner import reward_model
from cola_ray.rollout.reward_model import RewardEndpoint, RewardModel, score_with
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset
from cola_ray.tasks.chat import ChatTokenizer
from cola_ray.tasks.preference import Preference

WORDS = ["<pad>", "<eos>", "say", "good", "bad", *(f"w{i}" for i in range(60))]


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def pairs(tmp_path):
    """What is chosen says good, what is rejected bad, somewhere among other words."""
    draw, rows = np.random.default_rng(0), []
    for number in range(120):
        words = [f"w{i}" for i in draw.integers(0, 60, 3)]
        said = {which: list(words) for which in ("good", "bad")}
        for which, one in said.items():
            one.insert(int(draw.integers(0, 4)), which)
        rows.append({
            "prompt": f"say w{number % 60} w{number // 2 % 60}",
            "chosen": " ".join(said["good"]),
            "rejected": [{"role": "assistant", "content": " ".join(said["bad"])}],
        })  # fmt: skip
    for row in rows:  # one form a column
        row["rejected"] = row["rejected"][0]["content"]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_prompt_is_on_one_side_with_all_its_pairs(pairs):
    task, other = Preference(str(pairs), 0), Preference(str(pairs), 1)
    prompts = {split: {p.question for p in task.problems(split)} for split in ("train", "heldout")}
    assert not prompts["train"] & prompts["heldout"]
    assert len(prompts["heldout"]) > 5
    for split in prompts:
        assert {pair.prompt for pair in task.pairs(split)} == prompts[split]
        assert {p.question for p in other.problems(split)} == prompts[split], "whatever the seed"
    assert all("good" in response for _, response in task.demonstrations())


def test_chat_messages_keep_their_roles(tmp_path):
    row = {name: [{"role": "user", "content": "say w1"}, {"role": "assistant", "content": name}]
           for name in ("chosen", "rejected")}  # fmt: skip
    prompt = [{"role": "system", "content": "briefly"}, {"role": "user", "content": "say w1"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": prompt, **{n: said[-1:] for n, said in row.items()}}))
    task = Preference(str(tmp_path), 0)
    (pair,) = [*task.pairs("train"), *task.pairs("heldout")]
    assert (list(pair.prompt), pair.chosen, pair.rejected) == (prompt, "chosen", "rejected")


def test_rows_without_prompts_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "a"}')
    with pytest.raises(ValueError, match=r"rows.jsonl, row 1, field prompt: missing; the row has question"):
        Preference(str(tmp_path), 0)


def test_long_conversations_lose_their_beginning(tokenizer, tmp_path):
    ids = ChatTokenizer(tokenizer, "").exchange_ids("say w1", "good bad")
    assert tokenizer.convert_ids_to_tokens(ids) == ["say", "w1", "good", "bad", "<eos>"]
    small = small_llama()
    small.config.num_labels = 1
    AutoModelForSequenceClassification.from_config(small.config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scorer = RewardModel(str(tmp_path), max_tokens=3)
    scored = asyncio.run(scorer.score(["say w1", "w9 w9"], ["good bad", "good bad"]))
    assert scored[0] == pytest.approx(scored[1], abs=1e-6)


def test_the_loss_is_bradley_terrys():
    rewards = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    assert reward_model.preference_loss(rewards).item() == pytest.approx(np.log1p(np.exp(-1)) + np.log1p(np.exp(2)))
    assert torch.autograd.gradcheck(reward_model.preference_loss, (rewards,))


class Said(list):
    """What a training loop reports."""

    def __init__(self):
        self.phases = []

    def __call__(self, metrics, saved=False):
        self.append(metrics)

    def doing(self, what):
        self.phases.append(what)


def test_a_reward_model_learns_which_is_better_and_scores_as_it_learnt(pairs, tokenizer, tmp_path, one_rank):
    small_llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = override(
        preset("tiny", task="preference"),
        {"task.name": "preference", "task.path": str(pairs), "model.base": str(tmp_path / "base"),
         "output_dir": str(tmp_path / "out"), "pretrain.max_steps": 40, "pretrain.base_lr": 3e-3,
         "pretrain.warmup_steps": 5, "cluster.learner_ranks": 1},
    )  # fmt: skip
    reward_model.train_loop(config, said := Said())
    assert said.phases == ["reading the pairs", "opening the model", "the first step", "saving the model"]
    assert said[0]["reward/loss"] == pytest.approx(np.log(2), abs=0.2)
    assert said[-1]["reward/accuracy"] > 0.9
    scorer = RewardModel(str(tmp_path / "out" / "model"), max_tokens=64, batch_size=7)
    heldout = Preference(str(pairs), 0).pairs("heldout")
    prompts = [pair.prompt for pair in heldout]
    chosen, rejected = (
        asyncio.run(scorer.score(prompts, [getattr(pair, side) for pair in heldout])) for side in ("chosen", "rejected")
    )
    assert np.mean(np.array(chosen) > np.array(rejected)) == said[-1]["reward/accuracy"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    alone = [
        float(model(torch.tensor([ChatTokenizer(tokenizer, "").exchange_ids(pair.prompt, pair.chosen)])).logits)
        for pair in heldout
    ]
    np.testing.assert_allclose(chosen, alone, atol=1e-5)


@pytest.mark.parametrize("padding", [None, 1])
def test_a_reward_model_without_padding_scores_a_batch_like_each_alone(tokenizer, tmp_path, padding):
    """It has no padding token, or one that responses end with: then it reads the token before, alone and in a batch."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1, eos_token_id=1, pad_token_id=padding,
    )  # fmt: skip
    classifier = LlamaForSequenceClassification(config).eval()
    classifier.save_pretrained(tmp_path)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    bare.save_pretrained(tmp_path)
    scorer = RewardModel(str(tmp_path), max_tokens=64, batch_size=3)
    prompts, responses = ["say w1"] * 7, [" ".join(["good"] * (1 + i)) for i in range(7)]
    rewards = asyncio.run(scorer.score(prompts, responses))
    rows = [ChatTokenizer(bare, "").exchange_ids(*pair) for pair in zip(prompts, responses, strict=True)]
    alone = [float(classifier(torch.tensor([row])).logits) for row in rows]
    np.testing.assert_allclose(rewards, alone, atol=1e-5)
    assert len({round(reward, 4) for reward in rewards}) > 3


@pytest.fixture
def endpoint():
    """Answers each request with the next of ``answers``: (status, body)."""
    answers, asked = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body = answers.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", answers, asked
    server.shutdown()


def test_an_endpoint_is_asked_again_when_its_server_stumbles(endpoint):
    url, answers, asked = endpoint
    answers += [(503, ""), (200, '{"rewards": [1.5, NaN]}')]
    first, second = asyncio.run(score_with(RewardEndpoint(url, 5.0), ["a", "b"], ["c", "d"]))
    assert first.value == 1.5
    assert second.failure == "returned nan"
    assert asked[0] == asked[1] == {"prompts": ["a", "b"], "responses": ["c", "d"]}


@pytest.mark.parametrize(
    ("reward", "failure"),
    [
        ("1e308", "returned 1e+308, more than 1e+06"), ('"1.0"', "returned '1.0'"), ("null", "returned None"),
        ("1e999", "returned inf"),
    ],
)  # fmt: skip
def test_what_an_endpoint_gives_is_a_reward_or_a_failure(endpoint, reward, failure):
    url, answers, _ = endpoint
    answers.append((200, f'{{"rewards": [{reward}, true]}}'))
    bad, good = asyncio.run(score_with(RewardEndpoint(url, 5.0), ["a", "b"], ["c", "d"]))
    assert bad.failure.startswith(failure)
    assert (good.value, good.failure) == (1.0, "")


@pytest.mark.parametrize(
    "answer",
    [
        (200, '{"scores": [1]}'), (200, '{"rewards": [1, 2]}'), (404, ""), (200, "null"), (200, "[" * 60_000),
        (200, '{"rewards": [1' + "0" * 100_000 + "]}"), (200, '{"rewards": 1}'),
    ],
)  # fmt: skip
def test_an_endpoint_that_answers_otherwise_fails_at_once(endpoint, answer):
    url, answers, asked = endpoint
    answers.append(answer)
    (reward,) = asyncio.run(score_with(RewardEndpoint(url, 5.0), ["a"], ["b"]))
    assert reward.failure.startswith("the reward model: ")
    assert len(asked) == 1
