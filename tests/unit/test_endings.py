"""What ends a response, of tokenizers and checkpoints made here."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cola_ray.settings.config import TaskConfig
from cola_ray.tasks import stop_strings
from cola_ray.tasks.endings import Endings, end_token_ids

CONTROL = ["<pad>", "<s>", "</s>", "<|eot_id|>", "<|start|>", "<|stop|>", "<think>", "</think>"]
LETTERS = [chr(code) for code in range(32, 127)] + ["\n"]
WORDS = {word: i for i, word in enumerate([*CONTROL, *LETTERS])}


def make(template=None, eos="</s>", leave_out=()):
    """One token a character; control tokens first."""
    words = {word: i for i, word in enumerate(word for word in WORDS if word not in leave_out)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=" "))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token=eos,
        extra_special_tokens=[word for word in CONTROL[3:] if word not in leave_out],
    )  # fmt: skip
    fast.chat_template = template
    return fast


TEMPLATE = "{% for m in messages %}<|start|>{{ m['role'] }}: {{ m['content'] }}<|stop|>\n{% endfor %}"


def write(folder, **files):
    for name, said in files.items():
        (folder / f"{name}.json").write_text(json.dumps(said))
    return folder


def test_all_end_tokens_of_a_checkpoint_end_a_response(tmp_path):
    folder = write(tmp_path, config={"eos_token_id": 2}, generation_config={"eos_token_id": [2, WORDS["<|stop|>"]]})
    assert end_token_ids(make(leave_out=["<|eot_id|>"]), folder)[:1] == (2,)
    assert set(end_token_ids(make(), folder)) == {2, WORDS["<|stop|>"], WORDS["<|eot_id|>"]}


def test_the_template_says_what_ends_a_turn(tmp_path):
    assert set(end_token_ids(make(TEMPLATE), write(tmp_path, config={}))) == {
        2, WORDS["<|stop|>"], WORDS["<|eot_id|>"]
    }  # fmt: skip
    refuses = "{{ raise_exception('no') }}"
    assert set(end_token_ids(make(refuses), tmp_path)) == {2, WORDS["<|eot_id|>"]}


def test_a_leftover_default_is_no_end_token(tmp_path):
    """Llama's default of 2 where 2 is a common token."""
    folder = write(tmp_path, config={"eos_token_id": 2}, generation_config={"eos_token_id": [2, 100]})
    words = {"a": 0, "b": 1, "c": 2, "<eos>": 3}
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")), eos_token="<eos>"
    )
    assert end_token_ids(bare, folder) == (3,)


@pytest.fixture(scope="module")
def endings():
    return Endings(make(), (2, 3), ("\nQ:", "END"))


def ids(text):
    found, rest = [], text
    while rest:
        piece = next(word for word in WORDS if rest.startswith(word))
        found.append(WORDS[piece])
        rest = rest[len(piece) :]
    return found


@pytest.mark.parametrize(
    ("said", "text", "kept"),
    [
        ("12 = 3", "12 = 3", None),
        ("12</s>", "12", "12</s>"),
        ("12<|eot_id|>34</s>", "12", "12<|eot_id|>"),
        ("<think>a</think>b</s>", "<think>a</think>b", "<think>a</think>b</s>"),
        ("<s>1<pad>2", "12", None),
        ("12\nQ: 3", "12", "12\nQ:"),
        ("1END2\nQ:3</s>", "1", "1END"),
        ("1</s>END", "1", "1</s>"),
        ("Q: 3", "Q: 3", None),
        ("", "", None),
        ("</s>", "", "</s>"),
        ("END", "", "END"),
        ("it 's <|start|>", "it 's <|start|>", None),
    ],
)
def test_text_and_length(endings, said, text, kept):
    assert endings.text(ids(said)) == text
    assert endings.length(ids(said)) == (None if kept is None else len(ids(kept)))


def test_tasks_declare_where_their_responses_end():
    assert stop_strings(TaskConfig(name="gsm8k", path="x")) == ("\nQuestion:",)
    assert stop_strings(TaskConfig(name="arithmetic")) == stop_strings(TaskConfig(name="twenty_questions")) == ()
    assert stop_strings(TaskConfig(name="preference", path="x")) == stop_strings(TaskConfig(name="countdown")) == ()
    assert stop_strings(TaskConfig(name=f"{__name__}:Lines")) == ("\n",)


class Lines:
    stop = ("\n",)


# --- workers --------------------------------------------------------------------------------------------------------


class FakeEngine:
    action_every, learnt_ends = 1, False

    def __init__(self, model_path, **settings):
        self.settings = settings


def test_a_worker_serves_a_model_whose_actions_last_as_its_settings_say(tmp_path, monkeypatch):
    from cola_ray.rollout import worker
    from cola_ray.settings.config import override
    from cola_ray.settings.presets import preset

    make().save_pretrained(tmp_path)
    write(tmp_path, config={"model_type": "llama"})
    monkeypatch.setattr(worker, "LatentEngine", FakeEngine)
    made = worker.EngineWorker(preset("tiny"), str(tmp_path), keep_hidden_states=False)
    assert made.engine.action_every == 1
    with pytest.raises(ValueError, match=r"model\.action_every = 2: actions of the served model last 1 tokens"):
        worker.EngineWorker(
            override(preset("tiny"), {"model.action_every": 2}), str(tmp_path), keep_hidden_states=False
        )


@pytest.mark.parametrize("space", ["latent", "token"])
def test_every_request_of_a_worker_knows_where_it_ends(tmp_path, monkeypatch, space):
    from cola_ray.rollout import agent_worker, evaluation_worker, worker
    from cola_ray.settings.config import override
    from cola_ray.settings.presets import preset

    make().save_pretrained(tmp_path)
    write(tmp_path, config={"model_type": "llama"}, generation_config={"eos_token_id": [2, WORDS["<|stop|>"]]})
    for name in ("LatentEngine", "TokenEngine"):
        monkeypatch.setattr(worker, name, FakeEngine)
    monkeypatch.setattr(worker, "RewardProcess", lambda *_: None)
    monkeypatch.setattr(evaluation_worker.EvaluationWorker, "num_actions", 64)
    config = override(preset("tiny"), {"rollout.stop": ("no",), "task.num_problems": 50, "rl.action_space": space})
    made = evaluation_worker.EvaluationWorker(config, str(tmp_path))
    assert set(made.engine.settings["stop_token_ids"]) == {2, WORDS["<|stop|>"], WORDS["<|eot_id|>"]}
    assert made.engine.settings["tokenizer"] is made.tokenizer
    problem = made._problem(0, [10, 11])
    requests = [
        made._request([10], 0, False),
        made._greedy_request([10], True),
        problem.request([10, 11, 12], 0, [], 5, -1),
    ]
    assert [request.stop for request in requests] == [("no",)] * 3
    assert [request.response_prefix for request in requests] == [0, 0, 1], "a search continues a response"
    assert made.endings.text(ids("1no2")) == "1"
    player = agent_worker.AgentWorker.__new__(agent_worker.AgentWorker)
    player.config, player.endings = config, made.endings
    assert player._request([10], 0, 1.0).stop == ("no",)
