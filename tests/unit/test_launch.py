"""What a run starts from and what it reads: settings that do nothing are refused, a model made from another is too."""

import json
import re
import shlex
from pathlib import Path

import pytest
from test_run_folder import USERS, fingerprint, write

from cola_ray.cli import arguments
from cola_ray.cli.arguments import from_command_line
from cola_ray.cli.commands import COMMANDS
from cola_ray.runs import launch, provenance, run_folder, status
from cola_ray.runs.provenance import first_lines, made_from, pretrained_dir, resolve, start_model
from cola_ray.settings import relevance
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset, trial
from cola_ray.settings.relevance import given, only_read, unread

ROOT = Path(__file__).parents[2]


def tiny(agents=False, **changes):
    return override(preset("tiny", agents), changes)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- settings that do nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "changes", "line"),
    [
        ("rl_math", {"task.path": "my.jsonl"}, "task.path = 'my.jsonl': has no effect here; "),
        ("rl_math", {"critic.steps": 3}, "critic.steps = 3: rl_math does not read it; rl_agent and sweep do"),
        ("pretrain", {"search.depth": 3}, "search.depth = 3: pretrain does not read it; evaluate does"),
        ("pretrain", {"rl.lr": 0.1}, "rl.lr = 0.1: pretrain does not read it; rl_math, rl_preference and rl_agent do"),
        ("rl_math", {"task.game": "x.z5"}, "task.game = 'x.z5': has no effect here; jericho does"),
        ("rl_math", {"sweep.asha": True}, "sweep.asha = True: rl_math does not read it; sweep does"),
        ("sweep", {"sweep.grace_steps": 3}, "sweep.grace_steps = 3: has no effect here; sweep.asha does"),
        ("rl_math", {"hardware.gpus": 3}, "hardware.gpus = 3: rl_math does not read it; only plan does"),
        ("rl_math", {"eval.problems": 3}, "eval.problems = 3: rl_math does not read it; evaluate does"),
        ("rl_math", {"replay.max_rows": 3}, "replay.max_rows = 3: has no effect here; "),
        ("rl_math", {"rollout.environment_processes": 3}, "rollout.environment_processes = 3: has no effect here; "),
        ("rl_math", {"model.path": "m", "model.base": "b"}, "model.base = 'b': has no effect here; "),
        ("rl_math", {"model.path": "m", "pretrain.lr": 1.0}, "pretrain.lr = 1.0: has no effect here; "),
        ("rl_math", {"model.path": "m", "data.path": "d"}, "data.path = 'd': has no effect here; pre-training does"),
        ("rl_math", {"data.text_field": "t"}, "data.text_field = 't': has no effect here; rows of data.path do"),
        ("pretrain", {"pretrain.steps": {"fta_idm": 3}}, "pretrain.steps.fta_idm = 3: has no effect here; "),
        ("pretrain", {"pretrain.stages": ("policy",), "pretrain.gumbel_tau": 1.0}, "pretrain.gumbel_tau = 1.0: has no"),
        ("evaluate", {"eval.ways": ("greedy",), "search.c_puct": 1.0}, "search.c_puct = 1.0: has no effect here; "),
        ("evaluate", {"q.jump": 3}, "q.jump = 3: has no effect here; of eval.ways, mcts_q does"),
        ("evaluate", {"eval.ways": ("greedy",), "eval.ks": (2,)}, "eval.ks = (2,): has no effect here; "),
        ("evaluate", {"rl.lr": 0.1}, "rl.lr = 0.1: evaluate does not read it; rl_math, rl_preference and rl_agent do"),
        ("evaluate", {"pretrain.lr": 0.1}, "pretrain.lr = 0.1: evaluate does not read it; pretrain, rl_m"),
        ("train_q", {"q.path": "q"}, "q.path = 'q': train_q does not read it; evaluate does"),
        ("atlas", {"rl.lr": 0.1}, "rl.lr = 0.1: atlas does not read it"),
        ("reproduce", {"rl.lr": 0.1}, "rl.lr = 0.1: reproduce does not read it"),
        ("capabilities", {"task.name": "countdown"}, "task.name = 'countdown': capabilities does not read it; "),
        ("capabilities", {"task.thinking": True}, "task.thinking = True: capabilities does not read it"),
        ("evaluate", {"samples.every": 3}, "samples.every = 3: evaluate does not read it; rl_math, rl_preference and"),
        ("rl_math", {"samples.prompts": 0, "samples.every": 3}, "samples.every = 3: has no effect here; samples."),
        ("rl_agent", {"task.name": "guess_city", "task.thinking": True}, "task.thinking = True: has no effect here; "),
        ("rl_agent", {"task.name": "guess_city", "rl.algorithm": "ppo", "critic.steps": 3}, "critic.steps = 3: has no"),
    ],
)  # fmt: skip
def test_settings_that_do_nothing_are_refused(job, changes, line):
    (said,) = [one for one in unread(tiny("guess_city" in changes.values(), **changes), job) if one[:9] == line[:9]]
    assert said.startswith(line)


@pytest.mark.parametrize("name", ["tiny", "smollm2-135m", "llama-3.1-8b"])
def test_presets_give_nothing(name):
    assert given(preset(name)) == given(preset(name, agents=True)) == {}


def test_every_field_is_read_by_some_job():
    for field in relevance.entries(preset("tiny")):
        assert any(relevance.reads(job, field) for job in relevance._READ if job != "plan") or "hardware" in field, (
            field
        )


def documented():
    """Every command line in the documents and in the commands' own examples."""
    documents = {*(ROOT / "docs").glob("*.md")} - {ROOT / "docs" / "extending.md"}  # whose files are not here
    sources = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted(documents))}
    sources |= {name: command.examples for name, command in COMMANDS.items()}
    jobs = "|".join(name for name, command in COMMANDS.items() if command.job)
    found = []
    for source, text in sources.items():
        text = text.replace("\\\n", " ").replace("M=outputs", "").replace("$M", "MODEL")
        for line in re.findall(rf"(?<![\w`-])cola_ray ((?:{jobs})\b[^\n]*)|`cola_ray ((?:{jobs}) --[^`\n]*)`", text):
            words = re.sub(r"\s{2,}\(.*|`.*|\s+#.*|\.\.\.", "", "".join(line))
            found.append(pytest.param(words, id=f"{source}: {words[:60]}"))
    return found


@pytest.mark.parametrize("line", documented())
def test_documented_command_lines_say_nothing_in_vain(line, monkeypatch):
    command, *words = shlex.split(line)
    job = COMMANDS[command].job
    if "--help" in words:
        return
    monkeypatch.setattr(arguments, "check", lambda *_: None)
    assert unread(from_command_line(job, words), job) == []


def test_a_trial_starts_from_the_sweeps_model_and_asks_for_nothing_that_made_it(tmp_path):
    config = tiny(**{"pretrain.steps.base": 5, "data.path": "x.jsonl", "model.num_actions": 32, "rl.lr": 0.1})
    made(config, tmp_path / "made")
    model = tmp_path / "made" / "model"
    settled = provenance.starting_from(override(config, {"data.date": "2025-01-01"}), model)
    one = trial(override(settled, {"output_dir": str(tmp_path / "sweep")}), 0.5, 1)
    assert launch.refusals(one, "rl_math") == []
    asked = {"model.path": str(model), "model.num_actions": 32, "data.date": "2025-01-01", "rl.lr": 0.1}
    own = {"seed": 1, "resume": True, "output_dir": one.output_dir, "rl.kl_coef": 0.5}
    assert given(one) == asked | own


def test_a_sweep_over_action_spaces_starts_from_a_model_whose_actions_last(tmp_path):
    made(tiny(**{"model.action_every": 2}), tmp_path / "held")
    model = tmp_path / "held" / "model"
    for space, every in (("latent", 2), ("token", 1)):
        sweep = override(
            provenance.starting_from(tiny(), model),
            {"sweep.field": "rl.action_space", "output_dir": str(tmp_path / "sweep")},
        )
        one = trial(sweep, space, 0)
        assert launch.refusals(one, "rl_math") == []
        assert launch.begin(one, "rl_math").config.model.action_every == every


def test_a_trial_of_a_sweep_is_given_what_it_reads():
    config = trial(tiny(**{"sweep.values": (1.0,), "rl.lr": 0.1}), 0.5, 0)
    assert unread(config, "rl_math") == []
    assert given(config)["rl.kl_coef"] == 0.5


JOBS = {
    "pretrain": [], "rl_math": [], "rl_agent": [], "sweep": [], "reproduce": [], "evaluate": ["--model.path", "MODEL"],
    "atlas": ["--model.path", "MODEL"], "diversity": ["--model.path", "MODEL"],
    "capabilities": ["--model.path", "MODEL", "--harness.tasks", "arc_easy"],
    "train_q": ["--model.path", "MODEL", "--data.path", "org/answers"],
    "reward_model": ["--task.path", "org/pairs", "--model.base", "org/base"],
    "rl_preference": ["--task.path", "org/pairs", "--task.reward-model", "http://localhost/"],
}  # fmt: skip


@pytest.mark.parametrize("how", [[], ["--resume"], ["--overwrite"]])
@pytest.mark.parametrize("job", JOBS)
def test_every_job_leaves_a_users_folder_alone(job, how, tmp_path, capsys):
    assert {*JOBS} == {*run_folder.WRITES}
    made(tiny(), tmp_path / "made")
    write(tmp_path / "mine", *USERS)
    before = fingerprint(tmp_path / "mine")
    words = [word.replace("MODEL", str(tmp_path / "made" / "model")) for word in JOBS[job]]
    with pytest.raises(SystemExit) as caught:
        from_command_line(job, [*words, "--output-dir", str(tmp_path / "mine"), *how])
    assert caught.value.code == 2
    assert "which no run of this folder wrote; give another --output-dir" in capsys.readouterr().err
    assert fingerprint(tmp_path / "mine") == before


def test_status_of_a_users_folder_is_no_run(tmp_path, capsys):
    write(tmp_path / "mine", *USERS)
    before = fingerprint(tmp_path / "mine")
    assert status.status([str(tmp_path / "mine")]) == 2
    assert "mine: no run there" in capsys.readouterr().err
    assert fingerprint(tmp_path / "mine") == before


# --- the model that a run starts from -----------------------------------------------------------------------------


def test_a_model_of_its_own_for_what_differs():
    usual = pretrained_dir(tiny())
    assert str(usual) == "outputs/pretrain-tiny-seed0/model"
    assert str(pretrained_dir(tiny(True))) == "outputs/pretrain-tiny-twenty_questions-seed0/model"
    others = [
        pretrained_dir(tiny(**changes))
        for changes in ({"model.num_actions": 64}, {"task.name": "chain_sum"}, {"data.path": "a/b.jsonl"}, {"seed": 1},
                        {"data.path": "c/b.jsonl"}, {"task.options": {"min_terms": 3}}, {"pretrain.steps": {"base": 5}},
                        {"model.base": "b"}, {"task.thinking": True}, {"task.num_problems": 7}, {"pretrain.lr": 1.0})
    ]  # fmt: skip
    assert len({usual, *others}) == 1 + len(others)
    assert re.fullmatch(r"pretrain-tiny-num_actions=64-\w{6}-seed0", others[0].parent.name)
    assert re.fullmatch(r"pretrain-tiny-chain_sum-seed0", others[1].parent.name)
    assert re.fullmatch(r"pretrain-tiny-path=b-\w{6}-seed0", others[2].parent.name)


def test_what_rl_does_makes_no_other_start():
    for changes in ({"rl.lr": 0.1}, {"rollout.top_k": 3}, {"cluster.learner_ranks": 1}, {"data.date": "2024-01-01"},
                    {"pretrain.save_every": 3}, {"output_dir": "x"}):  # fmt: skip
        assert pretrained_dir(tiny(**changes)) == pretrained_dir(tiny())


def test_the_name_does_not_depend_on_how_a_path_is_written(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    one, other = (tiny(**{"data.path": path}) for path in ("rows.jsonl", str(tmp_path / "rows.jsonl")))
    assert pretrained_dir(one) == pretrained_dir(other) == pretrained_dir(resolve(one, "rl_math"))


def made(config, folder, state="finished"):
    """A pre-trained model's folder, without weights."""
    run = run_folder.claim(override(config, {"output_dir": str(folder.resolve())}), "pretrain")
    (folder / "model").mkdir()
    sizes = config.model.model_dump(include={*provenance.SIZES})
    (folder / "model" / "config.json").write_text(
        json.dumps({"model_type": "cola", "hidden_size": 64, "num_attention_heads": 2, **sizes})
    )
    provenance.write(folder / "model", resolve(config, "pretrain"), "pretrain")
    run.end(state)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model.base": "other"}, "model.base = 'other': "),
        ({"data.path": "more.jsonl"}, "data.path = 'more.jsonl': "),
        ({"model.num_actions": 32}, "model.num_actions = 32: "),
        ({"pretrain.lr": 1.0}, "pretrain.lr = 1.0: "),
        (
            {"task.options": {"a": 1}, "task.name": "chain_sum", "task.path": ""},
            "model.path = 'outputs/pretrain-smollm2-135m-chain_s",
        ),
    ],
)
def test_a_model_made_from_something_else_is_refused(changes, line):
    usual = preset("smollm2-135m")
    made(usual, pretrained_dir(usual).parent)
    assert launch.refusals(usual, "rl_math") == []
    asked = override(preset("smollm2-135m", task=changes.get("task.name", "")), changes)
    (said,) = launch.refusals(asked, "rl_math")
    assert said.startswith(line)


def test_options_that_a_model_was_made_without_are_refused():
    usual = override(preset("smollm2-135m", task="chain_sum"), {"task.name": "chain_sum"})
    made(usual, pretrained_dir(usual).parent)
    asked = override(usual, {"task.options": {"min_terms": 3}})
    assert launch.refusals(usual, "rl_math") == []
    (line,) = launch.refusals(asked, "rl_math")
    assert line.startswith("task.options.min_terms = 3: ")
    assert "was made without it; pre-train with --task.options.min-terms" in line


def test_a_model_that_was_made_so_is_taken():
    usual = override(preset("smollm2-135m"), {"data.path": "x.jsonl", "pretrain.max_steps": 5})
    made(usual, pretrained_dir(usual).parent)
    assert launch.refusals(usual, "rl_math") == []
    assert launch.refusals(preset("smollm2-135m"), "rl_math") == [], "asks for nothing"
    assert "pretrain.steps" in launch.refusals(override(usual, {"pretrain.max_steps": 6}), "rl_math")[0]


def test_an_unfinished_or_unknown_start_is_not_taken():
    usual = preset("smollm2-135m")
    folder = pretrained_dir(usual).parent
    made(usual, folder, "stopped")
    assert (
        "its pre-training has not finished; make one with `cola_ray pretrain --preset smollm2-135m --resume`"
        in (launch.refusals(usual, "rl_math")[0])
    )
    run_folder.RunFolder(folder, "pretrain").end("finished")
    (folder / "model" / "provenance.json").unlink()
    assert "has no provenance.json" in launch.refusals(usual, "rl_math")[0]
    assert launch.refusals(override(usual, {"model.path": str(folder / "model")}), "rl_math") == []


def test_a_start_that_another_run_is_making_is_waited_for():
    folder = pretrained_dir(tiny()).parent
    making = run_folder.claim(tiny(output_dir=str(folder.resolve())), "pretrain")
    (line,) = launch.refusals(tiny(), "rl_math")
    assert line.endswith("another run is pre-training it; wait for its end, or give another --seed")
    making.end("stopped")
    assert launch.refusals(tiny(), "rl_math") == []


def test_sizes_beside_a_model_that_has_others(tmp_path):
    made(tiny(**{"model.num_actions": 32}), tmp_path / "made")
    path = {"model.path": str(tmp_path / "made" / "model")}
    (line,) = launch.refusals(tiny(**path, **{"model.num_actions": 64}), "rl_math")
    assert line == f"model.num_actions = 64: {path['model.path']} has 32; leave it out"
    assert launch.refusals(tiny(**path, **{"model.num_actions": 32}), "rl_math") == []
    begun = launch.begin(tiny(**path, output_dir="out"), "rl_math")
    assert begun.config.model.num_actions == 32, "the preset's 16 are not asked for"


def test_how_long_actions_last_is_the_models_own(tmp_path):
    """Also of a model that is older than the setting; and what does not go with it is refused for the model's sake."""
    for name, every in (("held", 2), ("old", None)):
        made(tiny(**({"model.action_every": 2} if every else {})), tmp_path / name)
    sizes = json.loads((tmp_path / "old" / "model" / "config.json").read_text())
    sizes.pop("action_every", None)
    (tmp_path / "old" / "model" / "config.json").write_text(json.dumps(sizes))
    held, old = ({"model.path": str(tmp_path / name / "model")} for name in ("held", "old"))
    (line,) = launch.refusals(tiny(**held, **{"model.action_every": 3}), "rl_math")
    assert line == f"model.action_every = 3: {held['model.path']} has 2; leave it out"
    (line,) = launch.refusals(tiny(**old, **{"model.action_every": 2}), "rl_math")
    assert line == f"model.action_every = 2: {old['model.path']} has 1; leave it out"
    over_tokens = launch.begin(tiny(**held, **{"rl.action_space": "token", "output_dir": "tokens"}), "rl_math").config
    assert over_tokens.model.action_every == 1, "no token lasts"
    (line,) = launch.refusals(tiny(**held, **{"data.path": "log"}), "train_q")
    assert line.startswith("model.action_every = 2: the model's actions last, and Q learns token by token")
    (line,) = launch.refusals(tiny(**held, **{"eval.ways": ("greedy", "mcts_q"), "q.path": "q"}), "evaluate")
    assert line.startswith("eval.ways = ('greedy', 'mcts_q'): mcts_q's Q is of single tokens")
    made(tiny(**{"model.learnt_ends": True}), tmp_path / "ends")
    ends = {"model.path": str(tmp_path / "ends" / "model")}
    (line,) = launch.refusals(tiny(**ends, **{"pretrain.stages": ("fta_policy",), "output_dir": "more"}), "pretrain")
    assert line.startswith("pretrain.stages = ('fta_policy',): it draws all actions of a text at once")
    more = tiny(**ends, **{"pretrain.stages": ("actions",), "pretrain.switch_cost": 0.3, "output_dir": "more"})
    assert launch.begin(more, "pretrain").config.model.learnt_ends
    (line,) = launch.refusals(override(more, {"output_dir": "another", **held}), "pretrain")
    assert line.startswith("pretrain.switch_cost = 0.3: has no effect here; the stage actions does")
    assert launch.begin(tiny(**old, output_dir="first"), "rl_math").config.model.action_every == 1
    assert launch.begin(tiny(**held, output_dir="second"), "rl_math").config.model.action_every == 2
    usual = preset("smollm2-135m")
    made(usual, pretrained_dir(usual).parent)
    (line,) = launch.refusals(override(usual, {"model.action_every": 2}), "rl_math")
    assert line.startswith("model.action_every = 2: ")
    assert "was made with 1; pre-train with --model.action-every" in line


def test_the_first_lines(tmp_path):
    assert launch.first_lines(tiny(), "rl_math").splitlines() == [
        f"starts from  {tmp_path}/outputs/pretrain-tiny-seed0/model (made first)",
        "base         a small Llama, made here",
        "task         arithmetic",
        "data         demonstrations of arithmetic",
        "actions      16 latent actions",
        f"writes to    {tmp_path}/outputs/rl_math-tiny-seed0",
    ]
    usual = override(preset("smollm2-135m"), {"model.base": "org/base", "data.path": "org/corpus"})
    made(usual, tmp_path / "made")
    config = override(
        preset("smollm2-135m"), {"model.path": str(tmp_path / "made" / "model"), "rl.action_space": "token"}
    )
    said = first_lines(resolve(config, "rl_math"), "rl_math", start_model(config)).splitlines()
    assert said[1:5] == ["base         org/base", "task         instructions", "data         org/corpus",
                         "actions      tokens of the vocabulary"]  # fmt: skip


def test_the_date_is_the_start_models_and_then_the_runs(tmp_path):
    made(tiny(**{"data.date": "2024-02-29"}), tmp_path / "made")
    config = tiny(**{"model.path": str(tmp_path / "made" / "model"), "output_dir": "out"})
    assert resolve(config, "evaluate").data.date == "2024-02-29"
    first = launch.begin(override(config, {"data.date": "2025-01-01"}), "rl_math")
    again = resolve(override(config, {"resume": True}), "rl_math")
    assert first.config.data.date == again.data.date == "2025-01-01"
    provenance.write(tmp_path / "made" / "model", first.config, "rl_math", first.start)
    assert resolve(config, "evaluate").data.date == "2025-01-01"


def test_switches_of_the_chat_template_are_the_start_models(tmp_path):
    silent, aloud = ({"data.chat_options": {"enable_thinking": value}} for value in (False, True))
    made(tiny(**silent), tmp_path / "made")
    config = tiny(**{"model.path": str(tmp_path / "made" / "model"), "output_dir": "out"})
    assert resolve(config, "evaluate").data.chat_options == {"enable_thinking": False}
    assert resolve(config, "capabilities").data.chat_options == {}, "which does not read them"
    first = launch.begin(override(config, aloud), "rl_math")
    again = resolve(override(config, {"resume": True}), "rl_math")
    assert first.config.data.chat_options == again.data.chat_options == {"enable_thinking": True}
    provenance.write(tmp_path / "made" / "model", first.config, "rl_math", first.start)
    assert resolve(config, "evaluate").data.chat_options == {"enable_thinking": True}


def test_making_the_start_model_asks_for_the_same(tmp_path):
    """What pre-training on the way makes lies where the run looks for it."""
    for changes in ({}, {"task.name": "countdown", "task.thinking": True}, {"rl.lr": 0.1, "pretrain.max_steps": 3},
                    {"task.name": "preference", "task.path": "p.jsonl", "task.reward_model": "http://x"}):  # fmt: skip
        config = tiny(**changes)
        making = only_read(override(config, {"output_dir": "", "task.reward_model": ""}), "pretrain")
        assert unread(making, "pretrain") == []
        assert Path(resolve(making, "pretrain").output_dir) / "model" == start_model(config).resolve()
        assert made_from(making) == made_from(config)


@pytest.mark.parametrize("changes", [
    {"task.reward_timeout_s": 5.0}, {"task.max_failed_rewards": 0.5}, {"task.reward": "mine.py:mine"},
    {"task.name": "preference", "task.path": "p.jsonl", "task.reward_model": "http://x"},
    {"task.name": "twenty_questions", "task.oracle": "a-model"}, {"rl.lr": 0.1, "rollout.num_workers": 2},
], ids=lambda changes: "-".join(changes))  # fmt: skip
def test_what_only_rl_reads_is_no_reason_to_refuse_the_pretraining_before_it(changes):
    config = tiny(**changes)
    making = only_read(config, "pretrain")
    assert unread(making, "pretrain") == []
    assert made_from(making) == made_from(config)
