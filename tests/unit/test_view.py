"""``cola_ray view``: the page has what the run recorded, makes markup of nothing that it shows, and works."""

import base64
import dataclasses
import hashlib
import json
import math
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import scramble, words
from test_controller import STEPS, config, run
from test_samples import Talking

from cola_ray.runs import event_log, run_folder, samples
from cola_ray.runs.samples import Sample, SampleFolder, files, read
from cola_ray.settings.config import override
from cola_ray.studies import view as module
from cola_ray.studies.view import as_json, page, page_data, view

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \u2028 {{ script }} \u202e\x1b[31m"


class Hostile(Talking):
    def trajectory(self, worker, version, sibling):
        made = super().trajectory(worker, version, sibling)
        return dataclasses.replace(
            made, prompt_ids=np.array([7, 8]), text=f"{HOSTILE} {sibling}", parts={"exact": 0.25}
        )


@pytest.fixture
def folder(tmp_path):
    """Of a run whose loop is the real one, over workers that answer at once."""
    settings = override(config(**{"samples.every": 3, "rl.eval_every": 3}), {"output_dir": str(tmp_path / "demo")})
    claimed = run_folder.claim(settings, "rl_math")
    controller, _ = run(Hostile(), {"samples.every": 3, "rl.eval_every": 3})
    log, kept = event_log.EventLog(claimed.path), SampleFolder(claimed.path, 8, words)
    for event in controller.supervisor.events:
        if "samples" in event:
            kept.keep(event["samples"])
        if "step" in event:
            log.append("step", version=event["step"], **event["metrics"])
    log.append("end")
    claimed.end("finished", STEPS)
    return claimed.path


class Parsed(HTMLParser):
    """Every element, closed where it must be; scripts and styles with their texts."""

    ALONE = ("meta", "input")

    def __init__(self, text):
        super().__init__()
        self.stack, self.elements, self.texts = [], [], {}
        self.feed(text)
        self.close()
        assert not self.stack, "all is closed"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.ALONE:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] in ("script", "style", "title"):
            self.texts.setdefault(self.stack[-1], []).append(data)

    @property
    def data(self):
        return json.loads(self.texts["script"][0])


def shown(file, *acts):
    """What a document shows at first and after each act; see page_dom.js."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node to run the page's script")
    shim = Path(__file__).with_name("page_dom.js")
    done = subprocess.run([node, shim, file, json.dumps(acts)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- data ---------------------------------------------------------------------------------------------------------


def test_the_page_has_what_the_run_recorded(folder, capsys):
    assert view([str(folder)]) == 0
    out = folder.parent / "demo.html"
    assert capsys.readouterr().out.startswith(f"{out}: ")
    data = Parsed(out.read_text()).data
    rows = [row for file in files(folder) for row in read(file)]
    assert {(row["step"], row["kind"]) for row in rows} >= {(1, "train"), (3, "train"), (6, "eval"), (0, "base")}
    assert len(data["samples"]) == len(rows)
    for one, row in zip(data["samples"], rows, strict=True):
        assert data["prompts"][one["prompt"]] == row["prompt"] == "w7 w8"
        same = ("step", "kind", "group", "sibling", "completion", "reward", "failure", "truncated", "tokens", "actions",
                "parts")  # fmt: skip
        assert {name: one[name] for name in same} == {name: row[name] for name in same}
        if row["log_probs"] is not None:
            assert one["log_probs"] == pytest.approx(row["log_probs"], rel=1e-5)
        assert one["advantages"] == (None if row["advantages"] is None else pytest.approx(row["advantages"][0]))
    assert rows[0]["completion"].startswith(HOSTILE)
    history = event_log.history(event_log.read(folder))
    for name, (steps, values) in data["curves"].items():
        assert values == pytest.approx([history[step][name] for step in steps], rel=1e-5)
    assert data["curves"]["reward/mean"][0] == list(range(1, STEPS + 1))
    assert (data["run"]["state"], data["run"]["step"]) == ("ended", f"{STEPS} of {STEPS}")


def test_a_page_of_some_has_whole_groups_of_every_step(folder):
    rows, whole = page_data(folder, 16)["samples"], page_data(folder, 10_000)["samples"]
    assert page_data(folder, 16)["kept"].endswith("; --samples N shows more")
    assert (
        page_data(folder, 10_000)["kept"] == f"{len(whole)} completions, from 7 of 7 steps and evaluations with samples"
    )
    assert {(row["step"], row["kind"]) for row in rows} == {(row["step"], row["kind"]) for row in whole}
    assert len(rows) < len(whole)
    taken = {(row["step"], row["kind"], row["group"]) for row in rows}
    assert rows == [row for row in whole if (row["step"], row["kind"], row["group"]) in taken]


def test_a_run_without_samples_has_curves_and_says_why(folder):
    shutil.rmtree(folder / "samples")
    data = page_data(folder, 9)
    assert data["samples"] == []
    assert data["kept"].startswith("no samples: ")
    assert "reward/mean" in data["curves"]


def test_a_damaged_file_costs_its_own_samples(folder):
    file = files(folder)[0]
    gone = len(read(file))
    whole = len(page_data(folder, 1000)["samples"])
    file.write_bytes(b"PAR1")
    data = page_data(folder, 1000)
    assert len(data["samples"]) == whole - gone
    assert f"{file}: not readable" in data["kept"]


def test_long_curves_keep_their_ends():
    found = module.curves({step: {"loss": step / 2} for step in range(10_000)})
    steps, values = found["loss"]
    assert (len(steps), steps[0], steps[-1], values[-1]) == (500, 0, 9999, 9999 / 2)
    assert values == [step / 2 for step in steps]


# --- markup -------------------------------------------------------------------------------------------------------


def test_no_text_becomes_markup(folder):
    text = page(f"<b>{HOSTILE}", page_data(folder, 1000))
    parsed = Parsed(text)
    with_nothing = Parsed(page("demo", {**page_data(folder, 1000), "samples": [], "prompts": []}))
    assert [tag for tag, _ in parsed.elements] == [tag for tag, _ in with_nothing.elements]
    assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert parsed.data["samples"][0]["completion"].startswith(HOSTILE), "as it was, in the data"


def test_nothing_is_loaded_and_no_other_script_may_run(folder):
    text = page("demo", page_data(folder, 1000))
    parsed = Parsed(text)
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in parsed.elements}
    assert not [attributes for _, attributes in parsed.elements if {"src", "href", "action", "style"} & {*attributes}]
    (policy,) = [a["content"] for tag, a in parsed.elements if tag == "meta" and "http-equiv" in a]
    script, style = parsed.texts["script"][1], parsed.texts["style"][0]
    for kind, body in (("script-src", script), ("style-src", style)):
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "url(" not in style
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "fetch(", "import("):
        assert unsafe not in script


def test_json_in_a_page_has_numbers_and_no_markup():
    text = as_json({"a": [math.nan, -math.inf, 0.1234567891, 3, "<!--", "\u2028\ud800&"]})
    assert json.loads(text) == {"a": [None, None, 0.123457, 3, "<!--", "\u2028\ud800&"]}
    assert not set("<>&") & set(text)
    assert text.isascii()


def test_it_is_made_for_both_widths_and_both_themes():
    style = (Path(module.__file__).parent / "view.css").read_text()
    assert "prefers-color-scheme: dark" in style
    light, dark = (dict(re.findall(r"(--\w+): ([^;]+);", part)) for part in style.split("prefers-color-scheme: dark"))
    assert {*light} == {*dark}, "each colour has its like"
    assert 'name="viewport"' in (Path(module.__file__).parent / "view.html").read_text()
    fixed = [float(size) for size in re.findall(r"(?<![\w-])width: ([\d.]+)px", style)]
    assert not fixed, "nothing has a width of its own"


# --- the script -----------------------------------------------------------------------------------------------------


def test_the_script_shows_filters_and_opens_tokens(folder):
    assert view([str(folder)]) == 0
    acts = ["input #right=", "input #low=0.5", "input #low=", "input #text=nowhere", "input #text=ALERT(2)> & ",
            "toggle details", "click .token", "click .token", "input #kind=eval", "input #kind=base"]  # fmt: skip
    first, alone, low, again, nothing, found, opened, pressed, released, evaluated, base = shown(
        folder.parent / "demo.html", *acts
    )
    assert first["steps"] == ["1", str(STEPS)], "the first and the last, side by side"
    assert len(first["groups"]) == 8, "of two steps four prompts"
    assert first["curves"][0] == "reward/mean"
    assert HOSTILE.replace("\x1b", "\\u001b").replace("\u2028", "\\u2028").replace("\u202e", "\\u202e") in "".join(
        first["groups"]
    )
    assert first["count"] == "16 completions pass, of 8 prompts"
    assert "step 1, prompt 0, mean reward 0.5" in first["groups"][0]
    assert "reward 1" in first["groups"][0]
    assert "reward 0" in first["groups"][0]
    assert "exact 0.25" in first["groups"][0]
    assert (len(alone["groups"]), alone["count"]) == (4, "8 completions pass, of 4 prompts")
    assert (len(low["groups"]), low["count"]) == (4, "4 completions pass, of 4 prompts")
    assert not any("reward 0" in text for text in low["groups"])
    assert again["count"] == alone["count"] == found["count"]
    assert (nothing["groups"], nothing["count"]) == ([], "0 completions pass, of 0 prompts")
    assert len(opened["curves"]) > len(first["curves"]), "the other curves"
    assert (pressed["pressed"], len(pressed["choices"])) == (1, 1)
    assert "action 1, probability 0.368, policy of version 0, advantage" in pressed["choices"][0]
    assert (released["pressed"], released["choices"]) == (0, [])
    assert evaluated["steps"] == ["0", str(STEPS)]
    assert "version 0, prompt 0" in evaluated["groups"][0]
    assert base["steps"] == ["0", ""]
    assert len(base["groups"]) == 3


def spoken_in(count, tokens, **columns):
    """A page's data: of each of ``count`` prompts one completion in training."""
    one = {
        "step": 1, "kind": "train", "sibling": 0, "completion": "".join(tokens), "reward": 1.0, "failure": "",
        "truncated": False, "tokens": tokens, "by_policy": None, "actions": list(range(len(tokens))), "parts": [],
        "log_probs": [-1.0] * len(tokens), "versions": [0] * len(tokens), "advantages": None,
    }  # fmt: skip
    rows = [{**one, "group": group, "prompt": group} | columns for group in range(count)]
    prompts = [f"prompt {group}" for group in range(count)]
    return {"run": {}, "space": "latent", "curves": {}, "kept": "", "prompts": prompts, "samples": rows}


def test_keys_go_from_token_to_token_and_pass_a_strip_in_one_stop(tmp_path):
    file = tmp_path / "page.html"
    file.write_text(page("demo", spoken_in(1, ["one", " two", " three"])))
    acts = ["toggle details", *(f"key .token={key}" for key in ("Enter", "ArrowRight", "End", "End", "ArrowRight"))]
    _, opened, *pressed, released = shown(file, *acts, "key .token=Home", "key .token= ")
    assert (opened["stops"], opened["pressed"]) == (1, 0)
    assert [state["focused"] for state in pressed] == ["one", " two", " three", " three", " three", "one"]
    assert all((state["stops"], state["pressed"]) == (1, 1) for state in pressed)
    assert [int(re.search(r"action (\d)", state["choices"][0])[1]) for state in pressed] == [0, 1, 2, 2, 2, 0]
    assert (released["pressed"], released["choices"]) == (0, [])


def test_more_prompts_leave_what_is_opened(tmp_path):
    file = tmp_path / "page.html"
    file.write_text(page("demo", spoken_in(45, ["one"])))
    _, _, pressed, more, all_of_them = shown(file, "toggle details", "click .token", "click #more", "click #more")
    assert [len(state["groups"]) for state in (pressed, more, all_of_them)] == [20, 40, 45]
    assert [len(state["choices"]) for state in (pressed, more, all_of_them)] == [1, 1, 1]
    assert [state["more"] for state in (pressed, more, all_of_them)] == [True, True, False]


def test_escapes_are_elements_that_no_direction_reorders(tmp_path):
    file = tmp_path / "page.html"
    file.write_text(page("demo", spoken_in(1, ["\u05e9\u202e", "abc\u2066", ""])))
    closed, opened = shown(file, "toggle details")
    assert closed["unseen"] == ["\\u202e", "\\u2066"]
    assert opened["unseen"] == closed["unseen"] * 2


@pytest.mark.parametrize(
    ("reward", "text"), [(-1234567.0, "-1234567"), (1000.4, "1000"), (0.123456, "0.123"), (1e12, "1000000000000")]
)
def test_large_numbers_keep_their_digits(tmp_path, reward, text):
    file = tmp_path / "page.html"
    data = spoken_in(1, ["one"], reward=reward)
    file.write_text(page("demo", data))
    (only,) = shown(file)
    assert f"mean reward {text}prompt" in only["groups"][0]
    assert "1 token," not in only["groups"][0]
    assert "1 tokens" not in only["groups"][0]


def test_the_script_has_nothing_to_say_of_an_empty_run(folder):
    shutil.rmtree(folder / "samples")
    (folder / "log.jsonl").unlink()
    assert view([str(folder)]) == 0
    (only,) = shown(folder.parent / "demo.html")
    assert (only["groups"], only["count"], only["curves"], only["more"]) == ([], "", [], False)


# --- other actions ------------------------------------------------------------------------------------------------


@pytest.fixture
def spoken(cola, folder):
    """The run's model, and samples that it said: one whole completion, and one with an environment's words in it."""
    model = folder / "model"
    cola.save_pretrained(model)
    words().save_pretrained(model)
    shutil.rmtree(folder / "samples")
    prompt = torch.tensor([[5, 9, 11]])
    tokens, actions, log_probs = cola.generate_latent(prompt, max_new_tokens=6, seed=3, temperature=1.0)
    mixed = np.array([True, True, False, True, True, True])
    made = [
        Sample(1, "train", 0, sibling, prompt[0].numpy(), tokens[0].numpy(), "", 1.0, "", False, mask,
               actions[0].numpy(), log_probs[0].numpy(), np.zeros(6, np.int64), None)
        for sibling, mask in enumerate((None, mixed))
    ]  # fmt: skip
    SampleFolder(folder, 8, words).keep(made)
    return prompt, tokens, actions


def test_other_actions_give_what_the_model_says_under_them(cola, folder, spoken):
    prompt, tokens, actions = spoken
    assert view([str(folder), "--model"]) == 0
    data = Parsed((folder.parent / "demo.html").read_text()).data
    whole, mixed = data["samples"]
    count = cola.config.num_actions
    for place in range(tokens.shape[1]):
        prefix = torch.cat([prompt, tokens[:, :place]], 1).expand(count, -1)
        forced, _, _ = cola.generate_latent(prefix, max_new_tokens=1, actions=torch.arange(count)[:, None])
        texts = [f"w{token}" if token > 2 else ("<pad>", "<s>", "</s>")[token] for token in forced[:, 0].tolist()]
        assert [data["vocabulary"][one] for one in whole["others"][place]] == texts
        assert forced[int(actions[0, place]), 0] == tokens[0, place], "the taken action gives what was said"
    assert len(data["vocabulary"]) > 2
    assert [one is None for one in mixed["others"]] == [False, False, True, False, False, False]
    (closed, opened, clicked) = shown(folder.parent / "demo.html", "toggle details", "click .token")
    assert len(closed["given"]) == 1, "the environment's word is set off in the completion"
    assert opened["given"] == closed["given"] * 2, "and it is no action"
    assert "under all actions" in clicked["choices"][0]


def test_a_model_that_says_otherwise_is_refused(cola, folder, spoken, capsys):
    other = scramble(type(cola)(cola.config))
    for parameter in other.model.parameters():
        parameter.data.mul_(-1.0)
    other.save_pretrained(folder.parent / "other")
    words().save_pretrained(folder.parent / "other")
    assert view([str(folder), "--model", str(folder.parent / "other")]) == 2
    assert re.search(
        r"it gives \d+ of 11 tokens that were said; give a checkpoint of this run", capsys.readouterr().err
    )


# --- the command --------------------------------------------------------------------------------------------------


def test_what_is_no_run_and_what_is_not_ours_is_refused_in_a_line(folder, tmp_path, capsys):
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine")
    (tmp_path / "config.json").write_text("{}")
    token = folder / "config.json"
    cases = {
        "no run there; give a run's --output-dir": [str(tmp_path)],
        "exists, and no `cola_ray view` wrote it": [str(folder), "--out", str(mine)],
        "is a folder; give a file": [str(folder), "--out", str(tmp_path)],
        "no such folder": [str(folder), "--out", str(tmp_path / "x" / "y.html")],
        "--samples 0: out of range": [str(folder), "--samples", "0"],
        "none: no such folder": [str(folder), "--model", str(tmp_path / "none")],
    }
    for line, argv in cases.items():
        assert view(argv) == 2
        said = capsys.readouterr().err
        assert line in said
        assert said.count("\n") == 1
    token.write_text(token.read_text().replace('"action_space": "latent"', '"action_space": "token"'))
    assert view([str(folder), "--model"]) == 2
    assert "the run's actions are its tokens" in capsys.readouterr().err
    assert mine.read_text() == "<p>mine"
    assert not (tmp_path / "demo.html").exists()


def test_a_page_is_written_anew_and_the_run_is_left_alone(folder):
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert view([str(folder)]) == view([str(folder)]) == 0
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert samples.NAME in run_folder.WRITES["rl_math"]


def test_the_help_has_examples_that_are_commands(capsys, monkeypatch):
    with pytest.raises(SystemExit) as caught:
        view(["--help"])
    assert caught.value.code == 0
    lines = re.findall(r"^  (cola_ray view .*?)(?:  .*)?$", capsys.readouterr().out, re.MULTILINE)
    assert len(lines) >= 4
    monkeypatch.setattr(module, "_check", lambda run, out, count: (_ for _ in ()).throw(module._RefusedError("stop")))
    assert [view(shlex.split(line)[2:]) for line in lines] == [2] * len(lines)
