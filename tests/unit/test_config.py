"""Every refusal: one line that names field, value and fix."""

import json
import subprocess
import sys

import pytest

from cola_ray.checks.refusals import check
from cola_ray.cli import arguments
from cola_ray.cli.arguments import from_command_line
from cola_ray.model.checkpoints import RELEASED
from cola_ray.runs.provenance import resolve, start_model
from cola_ray.settings.config import Config, ConfigError, override
from cola_ray.settings.presets import preset


def refusal(changes, base="tiny"):
    with pytest.raises(ConfigError) as caught:
        check(override(preset(base), changes))
    return str(caught.value)


@pytest.mark.parametrize("name", ["tiny", "llama-3.1-8b"])
def test_presets_pass_their_own_checks(name):
    check(preset(name))


@pytest.mark.parametrize(
    ("field", "value"),
    [("rl.algorithm", "grpo"), ("rl.action_space", "token"), ("rl.kl_target", 0.1), ("rollout.temperature", 0.5)],
)
def test_what_acts_without_an_actor(field, value):
    soft = {"rl.algorithm": "etpo", "rl.kl_coef": 0.05, "rl.actor_free": True}
    check(override(preset("tiny"), soft))
    assert f"{field} = {value!r}: rl.actor_free needs" in refusal(soft | {field: value})


def test_the_papers_figures():
    paper = preset("llama-3.1-8b")
    assert (paper.model.num_actions, paper.model.num_idm_layers) == (64, 4)
    assert (paper.model.num_world_model_layers, paper.model.num_policy_layers) == (2, 8)
    assert (paper.rl.lr, paper.rl.kl_coef, paper.rl.group_size, paper.rl.prompts_per_step) == (5e-7, 0.001, 4, 64)
    assert (paper.rl.clip_low, paper.rl.grad_clip, paper.rl.adam_betas) == (0.2, 1.0, (0.9, 0.95))
    assert (paper.rollout.max_prompt_tokens, paper.rollout.max_new_tokens) == (1024, 2048)
    assert (paper.pretrain.gumbel_tau, paper.pretrain.entropy_coef, paper.pretrain.lr) == (2.0, 0.001, 1e-4)


def test_unknown_preset():
    with pytest.raises(ConfigError, match=r"preset = 'big': unknown; choose one of tiny, smollm2-135m"):
        preset("big")


def test_missing_data_path():
    assert refusal({"data.path": "/nowhere/train.jsonl"}).startswith("data.path = '/nowhere/train.jsonl': no such file")


def test_group_size_one():
    assert refusal({"rl.group_size": 1}).startswith("rl.group_size = 1: grpo compares completions")


def test_more_actions_than_the_codebook():
    line = refusal({"rollout.top_k": 65, "model.num_actions": 64})
    assert line == "rollout.top_k = 65: the codebook has 64 actions; use 0 (all) to 64"


def test_ranks_must_divide_batches():
    assert "rl.prompts_per_step x rl.group_size = 9" in refusal({"rl.prompts_per_step": 3, "rl.group_size": 3})
    assert "pretrain.batch_size = 5" in refusal({"pretrain.batch_size": 5})


def config_file(tmp_path, **fields):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return str(tmp_path)


def test_base_of_no_family(tmp_path):
    path = config_file(tmp_path, model_type="gpt2")
    known = "llama, mistral, qwen2, qwen3, gemma3_text, smollm3, or to what model.family names (docs/extending.md)"
    assert refusal({"model.base": path}) == f"model.base = {path!r}: a 'gpt2' model; CoLA attaches to {known}"


def test_heads_too_small_for_cpu(tmp_path):
    path = config_file(tmp_path, model_type="llama", hidden_size=64, num_attention_heads=4)
    assert "heads of 16; vLLM on CPU needs 32" in refusal({"model.base": path})
    check(override(preset("tiny"), {"model.base": path, "cluster.use_gpu": True}))


def test_checkpoint_with_fewer_actions(tmp_path):
    path = config_file(tmp_path, model_type="cola", hidden_size=64, num_attention_heads=2, num_actions=8)
    assert "codebook has 8 actions" in refusal({"model.path": path, "rollout.top_k": 9})


@pytest.mark.parametrize(
    ("whose", "has_biases"),
    [
        ({"model_type": "llama"}, True),
        ({"model_type": "mistral"}, False),
        ({"model_type": "cola", "base_model_type": "mistral"}, False),
        ({"model_type": "cola", "base_model_type": "smollm3"}, True),
        ({"model_type": "llama", "architectures": [RELEASED]}, True),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_steering_vectors_need_a_base_with_biases(tmp_path, whose, has_biases):
    path = config_file(tmp_path, hidden_size=64, num_attention_heads=2, num_key_value_heads=2, **whose)
    field = "model.path" if len(whose) > 1 else "model.base"
    asked = override(preset("tiny"), TOKENS | {field: path, "rl.steering": "all"})
    if has_biases:
        check(asked)
    else:
        with pytest.raises(ConfigError, match=r"a mistral model, whose MLPs have no biases, as rl.steering needs"):
            check(asked)


def test_texts_longer_than_the_checkpoints_context(tmp_path):
    path = config_file(tmp_path, model_type="cola", hidden_size=64, num_attention_heads=2, max_position_embeddings=128)
    check(override(preset("tiny"), {"model.path": path, "rollout.max_new_tokens": 64}))
    assert refusal({"model.path": path, "rollout.max_new_tokens": 65}) == (
        "rollout.max_new_tokens = 65: with rollout.max_prompt_tokens = 64 more than the 128 positions of "
        f"model.path = {path!r}; lower one of them"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("cluster.learner_ranks", 0), ("rl.max_steps", 0), ("rollout.max_new_tokens", 0), ("rollout.temperature", 0.0)],
)
def test_numbers_that_make_no_sense(field, value):
    assert refusal({field: value}).splitlines()[0].startswith(f"{field} = {value}: ")


def test_unknown_task_and_field_suggest_the_near_one():
    assert refusal({"task.name": "countdwn"}) == "task.name = 'countdwn': unknown task; did you mean countdown?"
    assert "did you mean rl.kl_coef?" in refusal({"rl.kl_cof": 1})
    assert refusal({"rl.kl_coef": "much"}).startswith("rl.kl_coef = 'much': ")


def test_a_task_of_ones_own_must_be_importable():
    check(override(preset("tiny"), {"task.name": "cola_ray.tasks.verifiable:Arithmetic"}))
    assert "task.name = 'nowhere:Task': No module named 'nowhere'" in refusal({"task.name": "nowhere:Task"})
    assert refusal({"task.name": "json:Task"}) == "task.name = 'json:Task': json has no Task"


TOKENS = {"rl.action_space": "token"}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rl.lora_rank": 8}, "rl.lora_rank = 8: for rl.action_space token; leave it out"),
        (TOKENS | {"rl.cache_hidden_states": True}, "rl.cache_hidden_states = True: with rl.action_space token the"),
        (TOKENS | {"task.name": "guess_city", "rl.algorithm": "chai"}, "rl.algorithm = 'chai': its players choose by"),
        (TOKENS | {"task.name": "guess_city", "rl.algorithm": "archer"}, "critic.encoder = '': with rl.action_space"),
        (TOKENS | {"rl.marginal_aliases": True}, "rl.action_space = 'token': rl.marginal_aliases needs 'latent'"),
        ({"rl.marginal_aliases": True, "rl.kl_estimator": "k1"}, "rl.kl_estimator = 'k1': rl.marginal_aliases needs"),
        ({"rl.dynamic_sampling": True, "rl.algorithm": "ppo"}, "rl.dynamic_sampling = True: for grpo and rloo on"),
        ({"eval.ways": ("mcts_q",)}, "q.path = '': mcts_q asks a Q; train one with `cola_ray train-q`"),
        (TOKENS | {"eval.ways": ("mcts_q",), "q.path": "a/b"}, "rl.action_space = 'token': mcts_q needs 'latent'"),
        ({"task.name": "preference"}, "task.path = '': preference needs rows with a column prompt"),
        (
            {"task.name": "preference", "task.path": "a/b", "task.reward_model": "./none"},
            "task.reward_model = './none'",
        ),
    ],
)
def test_what_does_not_go_together(changes, line):
    assert refusal(changes).startswith(line)


def test_a_codebooks_size_does_not_bound_tokens():
    check(override(preset("tiny"), TOKENS | {"rollout.top_k": 50, "rl.lora_rank": 4}))


def test_an_environment_brings_defaults_that_others_do_not_inherit():
    def options(*argv):
        return from_command_line("rl_agent", argv).task.options

    assert options() == options("--preset", "tiny", "--task.name=twenty_questions") == {"objects": 12, "skill": 0.6}
    assert options("--task.name", "guess_city") == {}
    assert options("--task.options", "skill", "0.5") == {"skill": 0.5}
    assert refusal({"task.name": "guess_city", "rl.cache_hidden_states": True}).startswith("rl.cache_hidden_states")


@pytest.mark.parametrize(
    ("job", "words", "named"),
    [
        ("pretrain", [], True),
        ("pretrain", ["--pretrain.stages", "policy", "--pretrain.lr", "1e-5"], True),
        ("pretrain", ["--data.path", "org/texts"], False),
        ("pretrain", ["--task.name", "dataset", "--task.path", "org/rows"], False),
        ("pretrain", ["--pretrain.stages", "actions", "fta_idm"], False),
        ("plan", [], False),
    ],
)
def test_large_presets_name_the_corpus_of_pre_training_where_nobody_names_another(job, words, named, monkeypatch):
    monkeypatch.setattr(arguments, "check", lambda *_: None)  # which would ask the hub for it
    for name in ("qwen2.5-0.5b", "llama-3.1-8b"):
        data = from_command_line(job, ["--preset", name, *words]).data
        assert (data.streaming, bool(data.more_paths), bool(data.weights)) == (named,) * 3
        assert ("fineweb-edu" in data.path) == named
    assert not from_command_line(job, ["--preset", "tiny"]).data.path


def test_gsm8k_needs_its_path():
    assert "gsm8k needs a folder" in refusal({"task.name": "gsm8k", "task.path": ""})


def test_override_makes_a_new_tree():
    before = preset("tiny")
    after = override(before, {"rl.kl_coef": 0.5, "pretrain.stages": ("policy",)})
    assert after.rl.kl_coef == 0.5
    assert after.pretrain.stages == ("policy",)
    assert before.rl.kl_coef == preset("tiny").rl.kl_coef
    assert Config.model_validate(after.model_dump()) == after


def test_command_line(capsys):
    config = from_command_line("plan", ["--preset", "llama-3.1-8b", "--rl.kl-coef", "0.5", "--seed", "3"])
    assert (config.rl.kl_coef, config.seed, config.model.num_policy_layers) == (0.5, 3, 8)
    with pytest.raises(SystemExit) as caught:
        from_command_line("rl_math", ["--rl.group-size", "1"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.strip().startswith("rl.group_size = 1")


@pytest.mark.parametrize("words", [["jobs/rl_math.py"], ["-m", "cola_ray", "pretrain"]])
def test_help_teaches(words):
    shown = subprocess.run([sys.executable, *words, "--help"], capture_output=True, text=True, check=True)
    for phrase in ("Examples:", "--model.num-actions", "K, codes in the codebook", "--preset"):
        assert phrase in shown.stdout


def test_refused_before_any_process_starts():
    run = subprocess.run(
        [sys.executable, "jobs/rl_math.py", "--preset", "llama-3.1-8b"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2, "refused settings, as jobs promise"
    assert "no CoLA model there; make one with `cola_ray pretrain --preset llama-3.1-8b`" in run.stderr


def test_a_submitted_jobs_results_do_not_go_where_ray_deletes_them(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    config = resolve(preset("tiny"), "rl_math")
    assert config.output_dir == str(tmp_path / "cola_ray" / "outputs" / "rl_math-tiny-seed0")
    assert start_model(config).is_relative_to(tmp_path)
    absolute = resolve(override(preset("tiny"), {"output_dir": "/data/run"}), "rl_math")
    assert absolute.output_dir == "/data/run"
