"""Data of one's own: the commands of docs/data.md, layouts against TRL's and verl's documents, splits, and mistakes."""

import asyncio
import functools
import json
import re
import shlex
import types
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import folder_of_ones_own
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from cola_ray.checks.refusals import check
from cola_ray.cli.arguments import from_command_line
from cola_ray.experience import Answer
from cola_ray.learner.corpus import load_documents
from cola_ray.loop.evaluation import HeldOut, graded
from cola_ray.settings import relevance
from cola_ray.settings.config import Config, ConfigError, DataConfig, TaskConfig, override
from cola_ray.settings.presets import preset
from cola_ray.tasks import inspection, make_task, summary
from cola_ray.tasks.chat import ChatTokenizer
from cola_ray.tasks.dataset import Dataset, faults, sources_of
from cola_ray.tasks.layouts import read
from cola_ray.tasks.parts import parts_of, read_part

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
FILES = dict(re.findall(r"```\w+ file=([\w./]+)\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = re.findall(r"^    cola_ray (data|rl) (.*)$", PAGE, re.MULTILINE)


def tokenizer():
    words = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")


def said(role, content):
    return {"role": role, "content": content}


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder with the page's files."""
    yield from folder_of_ones_own(FILES, tmp_path, monkeypatch)


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "words"), COMMANDS)
def test_every_command_of_the_page_passes_the_checks_and_shows_its_data(command, words, outside, capsys):
    config = from_command_line({"data": "data", "rl": "rl_math"}[command], shlex.split(words))
    assert inspection.faults(config.task) == [], "which tries the rewards"
    summary.show(config)
    shown = capsys.readouterr().out
    assert f"data     {config.task.path}: " in shown
    assert "prompt 1 (" in shown
    task = make_task(config.task, 0)
    problems = [problem for split in ("train", "heldout") for problem in task.problems(split)]
    assert len(problems) >= 2
    values = task.score_all([("train", 0, "no idea")])
    assert all(isinstance(value, float | None) for (value,) in values.values())


def test_the_page_has_seven_layouts_and_three_functions():
    assert len([name for name in FILES if not name.endswith(".py") and "/" not in name]) == 7
    assert len([name for name in FILES if name.endswith(".py")]) == 3
    used = " ".join(words for _, words in COMMANDS)
    assert all(name.split("/")[0] in used for name in FILES)


def test_the_pages_lines_on_mistakes_are_what_is_said(outside):
    (outside / "questions.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": null, "answer": "b"}\n')
    (outside / "short.py").write_text("def short(completions, **columns):\n    return [1.0]\n")
    (outside / "named.py").write_text("def near(completions, label):\n    return label\n")
    expected = re.findall(r"^    (task\.\w+ = .*)$", PAGE, re.MULTILINE)
    assert len(expected) == 3
    lines = refused({"task.path": "questions.jsonl", "task.reward": ("exact",)})
    (outside / "questions.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "c", "answer": "b"}\n')
    for name in ("short.py:short", "named.py:near"):
        lines += refused({"task.path": "questions.jsonl", "task.reward": (name,)})
    assert sorted(line.replace("named.py", "near.py") for line in lines) == sorted(expected)


def refused(changes, job="rl_math"):
    with pytest.raises(ConfigError) as caught:  # noqa: PT012
        config = override(preset("tiny", task="dataset"), {"task.name": "dataset", **changes})
        check(config, job)
    return str(caught.value).splitlines()


# --- layouts ----------------------------------------------------------------------------------------------------------

SKY, BLUE = said("user", "What color is the sky?"), said("assistant", "It is blue.")
GREEN, BRIEF = said("assistant", "It is green."), said("system", "Be brief.")
LAYOUTS = {
    # https://huggingface.co/docs/trl/dataset_formats
    "prompt-only": ({"prompt": "The sky is"}, "The sky is", "", ""),
    "prompt-only, conversational": ({"prompt": [SKY]}, (SKY,), "", ""),
    "prompt-completion": ({"prompt": "The sky is", "completion": " blue."}, "The sky is", " blue.", " blue."),
    "prompt-completion, conversational": ({"prompt": [SKY], "completion": [BLUE]}, (SKY,), "It is blue.", None),
    "language modeling, conversational": ({"messages": [BRIEF, SKY, BLUE]}, (BRIEF, SKY), "It is blue.", None),
    "preference": ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, "The sky is", "", " blue."),
    "preference, implicit": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."}, "The sky is", "", " blue."),
    "preference, conversational": (
        {"prompt": [SKY], "chosen": [BLUE], "rejected": [GREEN]}, (SKY,), "", "It is blue."),
    "preference, conversational and implicit": (
        {"chosen": [SKY, BLUE], "rejected": [SKY, GREEN]}, (SKY,), "", "It is blue."),
    "unpaired preference": (
        {"prompt": "The sky is", "completion": " blue.", "label": True}, "The sky is", " blue.", None),
    "unpaired preference, rejected": (
        {"prompt": "The sky is", "completion": " green.", "label": False}, "The sky is", "", ""),
    # https://verl.readthedocs.io/en/latest/preparation/prepare_data.html
    "verl": (
        {"data_source": "a", "prompt": [BRIEF, SKY], "reward_model": {"style": "rule", "ground_truth": "blue"},
         "extra_info": {"index": 3}}, (BRIEF, SKY), "blue", None),
    "verl, a ground truth that is no text": (
        {"prompt": [SKY], "reward_model": {"ground_truth": {"target": 3, "numbers": [1, 2]}}}, (SKY,),
        '{"target": 3, "numbers": [1, 2]}', None),
    "GSM8K": ({"question": "1 + 1?", "answer": "so\n#### 2"}, "1 + 1?", "so\n#### 2", None),
    "MATH": ({"problem": "1 + 1?", "solution": "so 2", "answer": 2}, "1 + 1?", "2", "so 2"),
    "Alpaca": ({"instruction": "Add", "input": "1, 1", "output": "2"}, "Add\n\n1, 1", "2", None),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "What color is the sky?"}, {"from": "gpt", "value": "Blue"}]},
        (SKY,), "Blue", None),
    "few-shot turns": (
        {"messages": [said("user", "a"), said("assistant", "b"), SKY, BLUE]},
        (said("user", "a"), said("assistant", "b"), SKY), "It is blue.", None),
    "messages without an answer": ({"messages": [BRIEF, SKY]}, (BRIEF, SKY), "", ""),
    "a prompt that the model continues": (
        {"prompt": [SKY, said("assistant", "It")], "answer": "blue"}, (SKY, said("assistant", "It")), "blue", None),
    "a column of system prompts": (
        {"system": "Be brief.", "question": "What color is the sky?", "answer": "blue"}, (BRIEF, SKY), "blue", None),
    "no system prompt in this row": ({"system": None, "question": "a", "answer": "b"}, "a", "b", None),
    "a system prompt already": ({"system": "Be long.", "prompt": [BRIEF, SKY]}, (BRIEF, SKY), "", ""),
    "no answer in this row": ({"question": "a", "answer": None}, "a", "", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ["row", "jsonl", "parquet"])
def test_a_layout_is_known(name, kind, tmp_path):
    row, prompt, solution, response = LAYOUTS[name]
    if kind == "row":
        found = read(row, {})
        assert (found.prompt, found.solution, found.response) == (prompt, solution, solution if response is None else
                                                                  response)  # fmt: skip
        return
    if kind == "jsonl":
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    else:
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    task = Dataset(str(tmp_path), 0)
    (problem,) = [*task.problems("train"), *task.problems("heldout")]
    assert (problem.question, problem.solution) == (prompt, solution)
    assert {key: value for key, value in problem.columns.items() if value is not None} == {
        key: value for key, value in row.items() if value is not None
    }, "all columns are kept for rewards"


@pytest.mark.parametrize(
    ("row", "columns", "line"),
    [
        ({"a": 1}, {}, "no prompt: the row has a; name its column with task.columns prompt NAME"),
        ({"question": None, "answer": "b"}, {}, "field question: null; text or chat messages are expected"),
        ({"prompt": ""}, {}, "field prompt: '' asks nothing"),
        ({"question": "a", "answer": True}, {}, "field answer: true; text is expected"),
        ({"messages": [BLUE]}, {}, "field messages: there is no message before the assistant's"),
        ({"messages": "hello"}, {}, 'field messages: "hello"; a list of chat messages is expected'),
        ({"conversations": [{"from": "robot", "value": "a"}]}, {}, "field conversations: .*robot"),
        ({"prompt": "a", "completion": [SKY, BLUE]}, {}, "field completion: 2 messages; one of the assistant"),
        ({"a": "b"}, {"prompt": "body"}, "field body: missing; the row has a"),
        ({"a": "b"}, {"prompt": "a", "solution": "c.d"}, "field c.d: missing; the row has a"),
    ],
)
def test_what_is_not_known_is_named(row, columns, line):
    with pytest.raises(ValueError, match=line):
        read(row, columns)


def test_columns_are_mapped_and_lead_into_objects():
    row = {"body": "a", "meta": {"gold": 3, "who": "x"}, "said": "three", "prompt": "not this"}
    found = read(row, {"prompt": "body", "solution": "meta.gold", "response": "said", "system": "meta.who"})
    assert (found.solution, found.response) == ("3", "three")
    assert found.prompt == (said("system", "x"), said("user", "a"))
    assert read({"a.b": "c", "question": "q"}, {"solution": "a.b"}).solution == "c", "a name with a dot is itself first"


# --- files and splits -------------------------------------------------------------------------------------------------


def write(folder, name, *rows):
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def asked(*names):
    return [{"question": name, "answer": "x"} for name in names]


def test_one_file_is_cut_by_the_prompts_checksum(tmp_path):
    write(tmp_path, "a.jsonl", *asked(*(f"question {i % 60}" for i in range(120))))
    first, second = (Dataset(str(tmp_path / "a.jsonl"), seed) for seed in (0, 1))
    sets = [{split: {one.question for one in task.problems(split)} for split in ("train", "heldout")}
            for task in (first, second)]  # fmt: skip
    assert sets[0] == sets[1], "whatever the seed"
    assert not sets[0]["train"] & sets[0]["heldout"]
    assert 3 < len(sets[0]["heldout"]) < 20
    assert len(first.problems("train")) + len(first.problems("heldout")) == 120
    assert [one.question for one in first.problems("train")] != [one.question for one in second.problems("train")]
    assert [one.index for one in first.problems("train")] == list(range(len(first.problems("train"))))


@pytest.mark.parametrize(
    ("names", "splits", "train", "heldout", "left_out"),
    [
        (("train.jsonl", "test.jsonl"), {}, "train.jsonl", "test.jsonl", []),
        (("train.jsonl", "validation.jsonl", "test.jsonl"), {}, "train.jsonl", "test.jsonl", ["validation"]),
        (("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "val.jsonl"), {}, "train[-_.][0-9]*", "val.jsonl",
         []),
        (("train.jsonl", "hard.jsonl"), {"heldout": "hard"}, "train.jsonl", "hard.jsonl", []),
        (("train_sft.jsonl", "test_sft.jsonl"), {"train": "train_sft", "heldout": "test_sft"}, "train_sft.jsonl",
         "test_sft.jsonl", []),
    ],
)  # fmt: skip
def test_a_folders_files_are_splits_by_their_names(names, splits, train, heldout, left_out, tmp_path):
    for number, name in enumerate(names):
        write(tmp_path, name, *asked(f"{number}"))
    found, others = sources_of(str(tmp_path), splits)
    assert {split: Path(source).name for split, source in found.items()} == {"train": train, "heldout": heldout}
    assert others == left_out
    task = Dataset(str(tmp_path), 0, splits=splits)
    held_out = names.index(heldout)
    assert [one.question for one in task.problems("heldout")] == [str(held_out)]
    trained = [str(i) for i, name in enumerate(names) if name.startswith(train.split("[")[0])]
    assert sorted(one.question for one in task.problems("train")) == trained


def test_files_of_one_split_are_cut_and_a_split_that_is_not_there_is_named(tmp_path):
    write(tmp_path, "a.jsonl", *asked("1", "2"))
    write(tmp_path, "b.jsonl", *asked("3"))
    assert sources_of(str(tmp_path), {}) == ({"": str(tmp_path)}, [])
    assert sources_of(str(tmp_path), {"train": "b"}) == ({"": str(tmp_path / "b.jsonl")}, ["a"]), "b alone, cut"
    with pytest.raises(
        ValueError, match=r"task.splits = {'heldout': 'b'}: nothing to train on; .* of a, b: name train"
    ):
        sources_of(str(tmp_path), {"heldout": "b"})
    with pytest.raises(ValueError, match=r"task.splits = {'heldout': 'test'}: no test; .* has files of a, b"):
        sources_of(str(tmp_path), {"heldout": "test"})
    with pytest.raises(ValueError, match=r"task.splits = {'heldout': 'test'}: .*a.jsonl is no folder"):
        sources_of(str(tmp_path / "a.jsonl"), {"heldout": "test"})


def test_what_is_not_of_the_one_split_that_has_a_usual_name_is_not_trained_on(tmp_path):
    write(tmp_path, "train.jsonl", *asked("1", "2", "3"))
    write(tmp_path, "hard.jsonl", *asked("4"))
    (tmp_path / "README.txt").write_text("not data")
    assert sources_of(str(tmp_path), {}) == ({"": str(tmp_path / "train.jsonl")}, ["hard"])
    task = Dataset(str(tmp_path), 0)
    assert {one.question for split in ("train", "heldout") for one in task.problems(split)} == {"1", "2", "3"}


def test_files_of_a_split_with_and_without_a_number_are_refused_and_none_is_dropped(tmp_path):
    for number, name in enumerate(("train.jsonl", "train-1.jsonl", "test.jsonl")):
        write(tmp_path, name, *asked(f"{number}"))
    (line,) = faults(TaskConfig(name="dataset", path=str(tmp_path)))
    assert line.startswith(
        f"task.path = {str(tmp_path)!r}: has train.jsonl and train-1.jsonl; number all files of train"
    )


def test_prompts_that_are_in_both_splits_are_held_out(tmp_path):
    write(tmp_path, "train.jsonl", *asked("1", "2", "3"))
    write(tmp_path, "test.jsonl", *asked("2"))
    task = Dataset(str(tmp_path), 0)
    assert {one.question for one in task.problems("train")} == {"1", "3"}
    assert task.in_both == 1


def test_csv_cells_are_text_as_they_are_written(tmp_path):
    long = "x" * 200_000
    text = f'question,answer\n"a, with\na line",007\nb,NA\n" c ",1.0\nd,{long}\n'
    (tmp_path / "rows.csv").write_text(text)
    task = Dataset(str(tmp_path / "rows.csv"), 0)
    rows = {one.question: one.solution for split in ("train", "heldout") for one in task.problems(split)}
    assert rows == {"a, with\na line": "007", "b": "NA", " c ": "1.0", "d": long}
    (part,) = parts_of(str(tmp_path / "rows.csv"))
    assert [row["answer"] for row in read_part(part)] == ["007", "NA", "1.0", long], "for pre-training, too"
    data = DataConfig(path=str(tmp_path / "rows.csv"))
    assert len(load_documents(data, None, ChatTokenizer(tokenizer(), ""), 64)[0]) == 4


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("question,answer\na,b\nc\n", "row 2: 1 cells, and the header has 2; fix"),
        ("", "empty; a header with the names"),
        ("question,question\na,b\n", "field question: there are two columns"),
        ("question,answer\n", "has no rows"),
        ('question,answer\n"a,b\n', "row 1: not CSV"),
        ("text,answer\na,b\n", "row 1: no prompt: the row has text, answer; name its column with task.columns"),
    ],
)
def test_a_broken_csv_file_is_named_with_its_row(content, line, tmp_path):
    (tmp_path / "rows.csv").write_text(content)
    config = TaskConfig(name="dataset", path=str(tmp_path / "rows.csv"))
    (found,) = faults(config)
    assert line in found
    with pytest.raises(ValueError, match=r"task\.path = ") as caught:
        Dataset.of(config, 0)
    assert line in str(caught.value)


class Hub:
    """What ``datasets.load_dataset`` gives, of these splits."""

    def __init__(self, **splits):
        self.splits, self.asked = splits, []

    def __call__(self, path, name=None):
        import datasets

        self.asked.append((path, name))
        if name is None and "main" in self.splits.get("configs", ()):
            raise ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']"
            )
        return {split: datasets.Dataset.from_list(rows) for split, rows in self.splits.items() if split != "configs"}


def test_splits_of_the_hub(monkeypatch):
    hub = Hub(train=asked("1", "2"), test=asked("3"), validation=asked("4"))
    monkeypatch.setattr("datasets.load_dataset", hub)
    task = Dataset("org/rows", 0)
    assert [one.question for one in task.problems("heldout")] == ["3"]
    assert task.sources[0].left_out == ["validation"]
    other = Dataset("org/rows", 0, splits={"heldout": "validation"}, subset="main")
    assert [one.question for one in other.problems("heldout")] == ["4"]
    assert hub.asked == [("org/rows", None), ("org/rows", "main")]
    monkeypatch.setattr("datasets.load_dataset", Hub(train=asked(*map(str, range(40)))))
    cut = Dataset("org/rows", 0)
    assert cut.sources[0].files == {"": "train"}
    assert 0 < len(cut.problems("heldout")) < 20
    monkeypatch.setattr("datasets.load_dataset", Hub(train=asked("1"), configs=("main",)))
    with pytest.raises(ValueError, match=r"task.path = 'org/rows': Config name is missing.*name one with task.subset"):
        Dataset("org/rows", 0)


# --- several sources --------------------------------------------------------------------------------------------------


def test_sources_have_the_shares_that_weights_give_them(tmp_path):
    write(tmp_path, "few.jsonl", *asked(*(f"few {i}" for i in range(12))))
    write(tmp_path, "many.jsonl", *asked(*(f"many {i}" for i in range(60))))
    paths = [str(tmp_path / name) for name in ("few.jsonl", "many.jsonl")]
    plain = Dataset(paths[0], 0, more_paths=paths[1:])
    few = {one.question for one in plain.problems("train") if one.source == "few"}
    many = {one.question for one in plain.problems("train") if one.source == "many"}
    assert len(plain.problems("train")) == len(few) + len(many)
    assert {one.source for one in plain.problems("heldout")} <= {"few", "many"}
    weighed = Dataset(paths[0], 0, more_paths=paths[1:], weights=(1.0, 1.0)).problems("train")
    counts = Counter(one.question for one in weighed)
    assert {*counts} == few | many, "each comes once at least"
    assert sum(counts[one] for one in few) == sum(counts[one] for one in many) == len(many)
    assert {counts[one] for one in many} == {1}
    assert max(counts[one] for one in few) - min(counts[one] for one in few) <= 1
    assert [one.index for one in weighed] == list(range(len(weighed)))
    assert len(Dataset(paths[0], 0, more_paths=paths[1:], weights=(1.0, 1.0)).demonstrations()) == len(few) + len(many)
    assert {one.source for one in Dataset(paths[0], 0).problems("train")} == {""}, "of one source nothing is told apart"


def test_held_out_prompts_of_one_source_are_trained_on_by_none(tmp_path):
    write(tmp_path, "a/train.jsonl", *asked("1", "2"))
    write(tmp_path, "a/test.jsonl", *asked("3"))
    write(tmp_path, "b/train.jsonl", *asked("3", "4"))
    write(tmp_path, "b/test.jsonl", *asked("5"))
    task = Dataset(str(tmp_path / "a"), 0, more_paths=[str(tmp_path / "b")])
    assert sorted((one.question, one.source) for one in task.problems("train")) == [("1", "a"), ("2", "a"), ("4", "b")]
    assert sorted((one.question, one.source) for one in task.problems("heldout")) == [("3", "a"), ("5", "b")]


def test_held_out_results_are_told_apart_by_source():
    facts = {"num_heldout": 3, "heldout_sources": ["a", "b", "a"]}

    async def dispatch(indices, *_):
        return [Answer([1.0, 0.0, 0.0][index]) for index in indices]

    workers = types.SimpleNamespace(facts=facts, dispatch=dispatch)

    async def nothing():
        return ()

    samples = types.SimpleNamespace(of_evaluation=lambda *_: None)
    held_out = HeldOut(Config().rl, workers, None, functools.partial(graded, right_from=1.0), nothing, samples)
    found = asyncio.run(held_out.evaluate(0, bare_base=False))
    assert found == {
        "reward": pytest.approx(1 / 3), "accuracy": pytest.approx(1 / 3), "reward/a": 0.5, "accuracy/a": 0.5,
        "reward/b": 0.0, "accuracy/b": 0.0,
    }  # fmt: skip


# --- the summary ------------------------------------------------------------------------------------------------------


def test_the_summary_has_what_was_read_and_prompts_as_the_model_gets_them(tmp_path):
    write(tmp_path, "train.jsonl", *asked("1", "2", "2 and 3", "4"), {"question": "5"}, *asked("6"))
    write(tmp_path, "test.jsonl", *asked("1"))
    task = TaskConfig(name="dataset", path=str(tmp_path), reward=("exact", "length"), reward_weights=(1.0, 0.5),
                      right_from=1.0)  # fmt: skip
    shown = list(summary.lines(Config(task=task), ChatTokenizer(tokenizer(), "")))
    text = "\n".join(shown)
    assert shown[0] == f"data     {tmp_path}: 7 rows of question, answer"
    assert "read     prompt from question, solution from answer, in 6 rows" in shown
    assert f"files    {tmp_path}/train.jsonl to train on, {tmp_path}/test.jsonl held out" in shown
    assert "         1 row to train on has a prompt that is held out, too: left out" in shown
    assert "         1 row without a solution" in shown
    assert "splits   5 problems to train on, 1 held out" in shown
    assert "reward   exact + 0.5 length; right from 1" in shown
    assert re.search(r"^tokens   \d+ on average, \d+ at most, of the prompts$", text, re.MULTILINE)
    assert len(re.findall(r"^prompt \d \(\d+ tokens?, as the model gets it\)$", text, re.MULTILINE)) == 3


def test_prompts_are_shown_as_the_start_models_template_is_told_to_write_them(tmp_path, monkeypatch):
    model, told = tmp_path / "model", []
    made = tokenizer()
    made.chat_template = "{{ loud }}{% for one in messages %}{{ one.content }}{% endfor %}"
    made.save_pretrained(model)
    (model / "config.json").write_text('{"model_type": "llama"}')
    known = {"date": "2024-02-29", "settings": {"data.chat_options.loud": True}}
    (model / "provenance.json").write_text(json.dumps(known))
    monkeypatch.setattr(summary, "lines", lambda config, chat: told.append((chat.date, chat.options)) or [])
    changes = {"task.name": "dataset", "task.path": "a.jsonl", "task.reward": "exact", "model.path": str(model)}
    config = override(preset("tiny", task="dataset"), changes)
    other = override(config, {"data.chat_options": {"loud": False}, "data.date": "2025-01-01"})
    assert not relevance.unread(other, "data")
    summary.show(config)
    summary.show(other)
    assert told == [("2024-02-29", {"loud": True}), ("2025-01-01", {"loud": False})]


def test_the_summary_counts_prompts_that_are_too_long(tmp_path):
    write(tmp_path, "a.jsonl", *asked(*(f"{'x' * number} ?" for number in range(40))))
    task = TaskConfig(name="dataset", path=str(tmp_path), reward=("exact",))
    config = override(Config(task=task), {"rollout.max_prompt_tokens": 1})
    lengths = types.SimpleNamespace(prompt_ids=list, tokenizer=types.SimpleNamespace(decode=str))
    shown = [line for line in summary.lines(config, lengths) if "max_prompt_tokens" in line]
    (line,) = shown
    train = len(make_task(task, 0).problems("train"))
    assert line == f"         {train:,} of these are longer than rollout.max_prompt_tokens = 1, and are left out"


def test_no_control_character_of_a_row_reaches_the_terminal(tmp_path):
    hostile = "\x1b]0;owned\x07sum\x1b[31m\u202eevil\x9b2J"
    write(tmp_path, "a.jsonl", {"question": hostile, "answer": hostile, hostile: 1})
    text = "\n".join(summary.lines(Config(task=TaskConfig(name="dataset", path=str(tmp_path / "a.jsonl"))), None))
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert "[31m evil 2J" in text


def test_the_summary_says_where_nothing_is_right(tmp_path):
    write(tmp_path, "a.jsonl", {"prompt": "x" * 5000})
    without = list(summary.lines(Config(task=TaskConfig(name="dataset", path=str(tmp_path))), None))
    assert "reward   none yet: task.reward says what a response is worth, and RL needs it" in without
    assert "reward   the verifier of arithmetic; right from 1" in summary.lines(Config(), None)
    task = TaskConfig(name="dataset", path=str(tmp_path), reward=("length",))
    text = "\n".join(summary.lines(Config(task=task), None))
    assert "length; no accuracy, since nothing says what is right (task.right_from)" in text
    assert "... (5,000 characters)" in text
    assert "as text, since there is no model yet" in text


# --- before a run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "job", "line"),
    [
        ({"task.path": ""}, "rl_math", "task.path = '': dataset needs rows: .jsonl, .parquet or .csv"),
        ({}, "rl_math", r"task.reward = \(\): rows do not say what a response is worth; give exact, math"),
        ({}, "evaluate", r"task.reward = \(\): rows do not say what a response is worth"),
        ({"task.reward": "verifier"}, "rl_math", "task.reward = 'verifier': dataset has none; leave it out"),
        ({"task.reward": "exact", "task.columns": {"prompt": "q"}}, "rl_math", "row 1, field q: missing; the row has"),
        ({"task.reward": "exact", "task.columns": {"promt": "q"}}, "rl_math", "did you mean prompt?"),
        ({"task.reward": "exact", "task.splits": {"train": "a"}}, "rl_math", "task.splits = {'train': 'a'}: .* folder"),
        ({"task.reward": "exact", "task.more_paths": ("rows.jsonl",)}, "rl_math", "task.path is there already; name"),
        (
            {"task.reward": "exact", "task.more_paths": ("b/rows.jsonl",)},
            "rl_math",
            "several are called rows, as their",
        ),
        (
            {"task.reward": "exact", "task.more_paths": ("no.jsonl",)},
            "rl_math",
            "task.more_paths = 'no.jsonl': no such",
        ),
        (
            {"task.reward": "exact", "task.more_paths": ("bad.jsonl",)},
            "rl_math",
            "task.more_paths = 'bad.jsonl': row 1",
        ),
        (
            {"task.reward": "exact", "task.weights": (1.0, 2.0)},
            "rl_math",
            r"task.weights = \(1.0, 2.0\): not one for each",
        ),
        ({"task.reward": "exact", "task.num_problems": 3}, "rl_math", "task.num_problems = 3: has no effect here"),
        ({"task.reward": "exact", "task.path": "no.jsonl"}, "rl_math", "task.path = 'no.jsonl': no such file"),
        ({"task.reward": "exact", "task.path": "rows.xlsx"}, "rl_math", "a file of type '.xlsx'; give a file, folder"),
    ],
)
def test_mistakes_are_one_line_before_a_run(changes, job, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "rows.jsonl", *asked("1", "2"))
    write(tmp_path, "b/rows.jsonl", *asked("3"))
    write(tmp_path, "bad.jsonl", {"text": "a"})
    (tmp_path / "rows.xlsx").write_text("x")
    lines = refused({"task.path": "rows.jsonl", **changes}, job)
    assert any(re.search(line, one) for one in lines), lines


def test_a_policy_cannot_be_cloned_from_prompts_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "rows.jsonl", {"prompt": "a"}, {"prompt": "b"})
    (line,) = refused({"task.path": "rows.jsonl", "task.reward": "length"})
    assert line.startswith("task.path = 'rows.jsonl': no row has a response, and the first policy is cloned from")
    config = override(preset("tiny", task="dataset"), {"task.name": "dataset", "task.path": "rows.jsonl"})
    with pytest.raises(ValueError, match="the task has no responses to learn from"):
        load_documents(DataConfig(), make_task(config.task, 0), ChatTokenizer(tokenizer(), ""), 64)


def test_nor_can_it_from_prompts_of_a_preference_run(tmp_path, monkeypatch):
    """With a pair among the rows, or texts, there is nothing to refuse; nor for ``cola_ray plan``."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "prompts.jsonl", {"prompt": "a"}, {"prompt": "b"})
    write(tmp_path, "pairs.jsonl", {"prompt": "a"}, {"prompt": "b", "chosen": "c", "rejected": "d"})
    write(tmp_path, "texts.jsonl", {"text": "a"})

    def lines(path, job="rl_preference", **changes):
        given = {"task.name": "preference", "task.path": path, "task.reward": "length", **changes}
        try:
            check(override(preset("tiny", task="preference"), given), job)
        except ConfigError as error:
            return str(error).splitlines()
        return []

    assert lines("prompts.jsonl") == [
        "task.path = 'prompts.jsonl': no row has a column chosen, and the first policy is cloned from those; give "
        "texts as --data.path, or the model to start from as --model.path"
    ]
    assert lines("pairs.jsonl") == []
    assert lines("prompts.jsonl", **{"data.path": "texts.jsonl"}) == []
    assert lines("prompts.jsonl", "plan") == []


def test_what_would_be_read_says_where_nothing_can_be_cloned(tmp_path):
    write(tmp_path, "rows.jsonl", {"prompt": "a"}, {"prompt": "b"})
    task = {"task.name": "dataset", "task.path": str(tmp_path / "rows.jsonl"), "task.reward": "length"}
    shown = list(summary.lines(override(preset("tiny", task="dataset"), task), None))
    assert "cloned   no response: RL needs a model to start from (--model.path), or texts (--data.path)" in shown


def test_columns_and_splits_are_of_data_sets_alone():
    for field, value in (("task.columns", {"prompt": "a"}), ("task.splits", {"train": "a"}), ("task.subset", "a"),
                         ("task.more_paths", ("a",))):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"{field}.* = .*: has no effect here; dataset does"):
            check(override(preset("tiny"), {field: value}), "rl_math")
