"""Passwords and tokens are used and never written: not in settings, errors, logs or on the terminal."""

import json

import pytest

from cola_ray.cli.arguments import from_command_line
from cola_ray.runs import failure, run_folder
from cola_ray.runs.redaction import redacted, redacted_tree
from cola_ray.settings.config import RunFailedError, override
from cola_ray.settings.presets import preset


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("http://ann:pw@host:5000/api", "http://***@host:5000/api"),
        ("http://token@host", "http://***@host"),
        ("postgresql+psycopg2://u:p%40ss@db/x?sslmode=require", "postgresql+psycopg2://***@db/x?sslmode=***"),
        ("mysql://u:p@ss/w:d@db/x", "mysql://***@db/x"),
        ("https://h/score?api_key=abc&model=x", "https://h/score?api_key=***&model=***"),
        ("https://h/score?abc", "https://h/score?***"),
        ("no answer from (https://h/?t=abc): refused", "no answer from (https://h/?t=***): refused"),
        ("https://h/#access_token=abc", "https://h/#access_token=***"),
        ("HTTP://ann:pw@host", "HTTP://***@host"),
        ("asked 'http://a:b@h/x', then http://c:d@i", "asked 'http://***@h/x', then http://***@i"),
        ("Authorization: Bearer abcdefgh.ijkl", "Authorization: Bearer ***"),
        ("authorization: basic QWxhZGRpbjpvcGVu", "authorization: basic ***"),
        ("password=hunter22 host=db", "password=*** host=db"),
        ('{"api_key": "abc123def"}', '{"api_key": "***"}'),
    ],
)
def test_secrets_are_hidden(text, kept):
    assert redacted(text) == kept
    assert redacted(kept) == kept


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////data/mlflow.db", "http://mlflow:5000", "accuracy 0.5 @ step 3", "ann@example.org",
        "tokens: 4000", "max_new_tokens = 64", "token = tokenizer.decode(ids)", "key=value", "/data/a?b", "C:\\x",
        "basic_tokenizer of a long name", "https://docs.ray.io/en/latest/index.html",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text):
    assert redacted(text) == text


def test_the_environments_secrets_are_hidden_wherever_they_turn_up(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "sk-0123456789-long")
    monkeypatch.setenv("SSH_KEY", str(tmp_path))  # a path that is there is none
    monkeypatch.setenv("SHORT_TOKEN", "word")
    assert redacted("got sk-0123456789-long and sk-0123456789") == "got *** and ***"
    assert redacted(f"{tmp_path} word") == f"{tmp_path} word"


def test_settings_are_hidden_at_any_depth_and_names_of_secrets_whole():
    tree = {"a": ("http://u:p@h",), "options": {"api_key": "plain", "objects": 20}, "rl": {"lr": 0.1, "token": True}}
    assert redacted_tree(tree) == {
        "a": ("http://***@h",), "options": {"api_key": "***", "objects": 20}, "rl": {"lr": 0.1, "token": True}
    }  # fmt: skip
    assert redacted_tree(preset("tiny").model_dump()) == preset("tiny").model_dump()


URI = "http://ann:hunter2@127.0.0.1:1/x?token=t0ken"


def test_a_runs_settings_are_written_without(tmp_path):
    settings = {"output_dir": str(tmp_path / "run"), "tracking_uri": URI, "task.reward_model": URI}
    config = override(preset("tiny"), settings | {"task.options": {"api_key": "hunter2"}})
    run_folder.claim(config, "rl_math")
    written = (tmp_path / "run" / "config.json").read_text()
    assert "hunter2" not in written
    assert "t0ken" not in written
    assert json.loads(written)["tracking_uri"] == "http://***@127.0.0.1:1/x?token=***"
    assert config.tracking_uri == URI, "what is used is whole"


def test_errors_are_told_without(tmp_path):
    with pytest.raises(RunFailedError) as caught, failure.explained_failures(tmp_path):
        raise ValueError(f"no answer from {URI}")
    told = [str(caught.value), *(file.read_text() for file in tmp_path.iterdir())]
    assert len(told) == 3
    assert not [one for one in told if "hunter2" in one or "t0ken" in one]


def test_refusals_are_told_without(capsys):
    with pytest.raises(SystemExit):
        from_command_line("rl_math", ["--tracking-uri", URI.replace("http", "htp"), "--task.reward-model", URI])
    said = "".join(capsys.readouterr())
    assert "tracking_uri = 'htp://***@" in said
    assert "hunter2" not in said
    assert "t0ken" not in said
