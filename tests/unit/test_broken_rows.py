"""Broken files, for whatever reads rows: one line with file, row, field and what to do, before and at loading alike."""

import gzip
import io
import json
import os
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cola_ray.checks.preflight import _logged, _pair
from cola_ray.learner.corpus import document
from cola_ray.learner.logged_q import load_log
from cola_ray.settings.config import Config, DataConfig, TaskConfig, override
from cola_ray.tasks import inspection, make_task, preference
from cola_ray.tasks.data_science import read_csv
from cola_ray.tasks.logged import logged
from cola_ray.tasks.rows import open_rows, peek, read_rows
from cola_ray.tasks.verifiable import Gsm8k, Math500

PAIRS = DataConfig(prompt_field="question", response_field="answer")
READERS = {
    "gsm8k": Gsm8k.read, "math500": Math500.read, "preference": preference.read, "reward_model": _pair,
    "corpus": lambda row: document(row, PAIRS), "texts": lambda row: document(row, DataConfig()), "train_q": _logged,
}  # fmt: skip
GOOD = {
    "gsm8k": {"question": "1 + 1?", "answer": "so\n#### 2"},
    "math500": {"problem": "1 + 1?", "solution": "so 2", "answer": "2"},
    "preference": {"prompt": "hello", "chosen": "good", "rejected": "bad"},
    "reward_model": {"prompt": "hello", "chosen": "good", "rejected": "bad"},
    "corpus": {"question": "1 + 1?", "answer": "2"},
    "texts": {"text": "hello"},
    "train_q": {"prompt_ids": [1], "token_ids": [[2, 3]], "actions": [[0, 1]], "rewards": [1.0], "failures": [""]},
}
ONE_LINE = re.compile(r"task\.path = '[^']+': \S.*")


def lines(*rows):
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def parquet(columns):
    buffer = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), buffer)
    return buffer.getvalue()


def not_unicode():
    """Arrow takes any bytes for text."""
    places = pa.array([0, 1], pa.int32()).buffers()[1]
    return pa.Array.from_buffers(pa.string(), 1, [None, places, pa.py_buffer(b"\xe9")])


def broken_files(good):
    """name of the file, content, and what must be said: for any reader; ``good`` is a row of its own."""
    said, whole = json.dumps(good), lines(good)
    columns = {name: [value, value] for name, value in good.items()}
    first = next(iter(good))
    twice = said[:-1] + f", {said[1:-1]}" + "}"
    return {
        "a line that is no JSON": ("a.jsonl", whole + b'{"x": \n' + whole, "a.jsonl, line 2: not JSON .* fix"),
        "a line cut short": ("a.jsonl", whole + whole[:12], "a.jsonl, line 2: not JSON"),
        "a comma after each line": ("a.jsonl", whole.strip() + b",\n", "a.jsonl, line 1: not JSON"),
        "two objects on a line": ("a.jsonl", whole + whole.strip() + whole, "a.jsonl, line 2: not JSON"),
        "lines that end in CR": ("a.jsonl", (whole.strip() + b"\r") * 2, "a.jsonl, line 1: not JSON"),
        "a control character": ("a.jsonl", whole + b'{"x": "a\x01b"}', "a.jsonl, line 2: not JSON"),
        "zero bytes": ("a.jsonl", whole + b"\0\0\n", "a.jsonl, line 2: not JSON"),
        "a list": ("a.jsonl", whole + b"[1]\n", r"a.jsonl, line 2: \[1\]; an object"),
        "a number": ("a.jsonl", whole + b"\n3\n", "a.jsonl, line 3: 3; an object"),
        "null": ("a.jsonl", whole + b"null\n", "a.jsonl, line 2: null; an object"),
        "a field twice": ("a.jsonl", whole + twice.encode(), f"a.jsonl, line 2: field {first} appears twice"),
        "nested without end": ("a.jsonl", whole + b"[" * 99999 + b"]" * 99999, "a.jsonl, line 2: nested too deep"),
        "objects without end": ("a.jsonl", whole + b'{"a":' * 9999 + b"1" + b"}" * 9999, "line 2: nested too deep"),
        "half a surrogate pair": ("a.jsonl", whole + b'{"x": "\\ud800"}', "a.jsonl, line 2: half a surrogate pair"),
        "a number of 30 digits": ("a.jsonl", whole + b'{"x": ' + b"9" * 30 + b"}", "line 2: the number 9+... has more"),
        "a number of 9999 digits": ("a.jsonl", whole + b'{"x": ' + b"9" * 9999 + b"}", "line 2: the number 9+... has"),
        "1e999": ("a.jsonl", whole + b'{"x": 1e999}', "a.jsonl, line 2: the number 1e999 is too large"),
        "Latin-1": ("a.jsonl", whole + b'{"x": "\xe9"}\n', r"a.jsonl, line 2: not UTF-8 \(byte 8 is 0xe9\); save"),
        "UTF-16": ("a.jsonl", whole.decode().encode("utf-16"), "a.jsonl, line 1: begins with a byte order mark"),
        "UTF-16 without a mark": ("a.jsonl", whole.decode().encode("utf-16-le"), "a.jsonl, line 1: not JSON"),
        "a byte order mark": ("a.jsonl", b"\xef\xbb\xbf" + whole, "a.jsonl, line 1: begins with a byte order mark"),
        "gzip under another name": ("a.jsonl", gzip.compress(whole), "a.jsonl, line 1: not UTF-8"),
        "gzip": ("a.jsonl.gz", gzip.compress(whole)[:-6], r"cannot read '.gz'; use .jsonl"),
        "a spreadsheet": ("a.xls", b"x,y\n1,2\n", r"cannot read '.xls'; use .jsonl"),
        "an empty file": ("a.jsonl", b"", "a.jsonl has no rows; one or more"),
        "empty lines": ("a.jsonl", b"\n \n", "a.jsonl has no rows; one or more"),
        "an empty list": ("a.json", b"[]", "a.json has no rows; one or more"),
        "a list cut short": ("a.json", f"[\n{said},\n{said}".encode(), "a.json, line 3: not JSON"),
        "a list of lists": ("a.json", b"[[1]]", "a.json: not a list of objects; use one"),
        "an object of lists": ("a.json", json.dumps({"data": [good]}, indent=1).encode(), "a.json, line 1: not JSON"),
        "words": ("a.json", b"hello", "a.json, line 1: not JSON"),
        "a list in Latin-1": ("a.json", b'[\n{"x": "\xe9"}]', "a.json, line 2: not UTF-8"),
        "Parquet cut short": ("a.parquet", parquet(columns)[:-20], "a.parquet: cannot be read as Parquet .* again"),
        "Parquet with a hole": (
            "a.parquet", parquet(columns)[:8] + b"\xff" * 40 + parquet(columns)[48:], "a.parquet: cannot be read as"),
        "no Parquet": ("a.parquet", b"hello", "a.parquet: cannot be read as Parquet"),
        "an empty Parquet file": ("a.parquet", b"", "a.parquet: cannot be read as Parquet"),
        "Parquet without rows": ("a.parquet", parquet(pa.table(columns).slice(0, 0)), "a.parquet has no rows"),
        "Parquet with a column twice": (
            "a.parquet", parquet(pa.Table.from_arrays([pa.array(["a"])] * 2, ["x", "x"])),
            "a.parquet, field x: there are two columns"),
        "Parquet without Unicode": (
            "a.parquet", parquet({"x": not_unicode()}), r"a.parquet, row 1: text that is not UTF-8 \(byte 0xe9\)"),
    }  # fmt: skip


FILES = list(broken_files({"x": "y"}))


def every_line(path, read):
    """What is said before a run, and while loading."""
    (before,) = peek(path, "task.path", read)
    with pytest.raises(ValueError, match=r"task\.path") as caught:
        read_rows(open_rows(path, "task.path"), path, "task.path", read)
    for line in (before, str(caught.value)):
        assert ONE_LINE.fullmatch(line), line
        assert len(line) < 500
    return before, str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("reader", ["gsm8k", "train_q"])
def test_a_broken_file_is_named_with_its_line(name, reader, tmp_path):
    file, content, expected = broken_files(GOOD[reader])[name]
    (tmp_path / file).write_bytes(content)
    for line in every_line(str(tmp_path / file), READERS[reader]):
        assert re.search(expected, line), line


# Values that no text is made of, and what is said of them.
VALUES = {
    "null": (None, "None|null"), "true": (True, "True|true"), "a list": ([1], r"\[1\]|'1'|a list"),
    "an object": ({"a": 1}, "a"),
    "lists in lists": ([["x"]], "x"), "an empty list": ([], r"\[\]"),
    "a message without content": ([{"role": "user"}], "content|role"),
    "a message of a robot": ([{"role": "robot", "content": "x"}], "robot"),
}  # fmt: skip
FIELDS = [(reader, field) for reader, row in GOOD.items() if reader not in ("train_q",) for field in row]


@pytest.mark.parametrize(("reader", "field"), FIELDS)
def test_a_value_of_another_kind_is_named_with_row_and_field(reader, field, tmp_path):
    good = GOOD[reader]
    for number, (value, shown) in enumerate(VALUES.values()):
        if reader in ("preference", "reward_model") and value is None and field == "prompt":
            continue  # then the prompt is what both responses begin with
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "rows.jsonl").write_bytes(lines(good, good) + b"\n" + lines({**good, field: value}))
        for line in every_line(str(folder), READERS[reader]):
            assert re.search(rf"rows.jsonl, row 3 \(line 4\), field {field}: .*({shown}|keep one kind)", line), line


@pytest.mark.parametrize(("reader", "field"), FIELDS)
def test_a_field_that_is_missing_is_named(reader, field, tmp_path):
    good = GOOD[reader]
    if reader in ("preference", "reward_model") and field == "prompt":
        return
    (tmp_path / "rows.jsonl").write_bytes(lines({name: value for name, value in good.items() if name != field}))
    if reader == "texts":
        (tmp_path / "rows.jsonl").write_bytes(lines({"content": "x"}))
    for line in every_line(str(tmp_path / "rows.jsonl"), READERS[reader]):
        assert re.search(r"row 1(, field (\w+): missing; the row has|: has columns .* data\.)", line), line


@pytest.mark.parametrize(("reader", "field"), [("gsm8k", "question"), ("math500", "problem"), ("preference", "prompt")])
def test_a_question_that_asks_nothing_is_named(reader, field, tmp_path):
    for number, nothing in enumerate(["", " \n", [{"role": "user", "content": ""}]]):
        file = tmp_path / f"{number}.jsonl"
        file.write_bytes(lines({**GOOD[reader], field: nothing}))
        for line in every_line(str(file), READERS[reader]):
            assert re.search(rf"row 1, field {field}: .* asks nothing; text or chat messages are expected", line), line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": [1e308]}, r"row 2, field rewards: response 1 has 1e\+308, more than 1e\+06"),
        ({"rewards": [float("nan")]}, "row 2, field rewards: response 1 has (nan|None)"),
        ({"rewards": ["1"]}, "row 2, field rewards: response 1 has '1'"),
        ({"rewards": [1.0, 2.0]}, "row 2, field rewards: 2 responses, and token_ids has 1"),
        ({"actions": [[0]]}, "row 2, field actions: response 1 has 1, and 2 tokens"),
        ({"actions": [[0, 1.5]]}, "row 2, field actions: 1.5 in a list of ids"),
        ({"actions": [[-2, 1]]}, "row 2, field actions: -2 in a list of ids"),
        ({"actions": [0]}, "row 2, field actions: 0; a list"),
        ({"token_ids": None}, "row 2, field token_ids: null; a list"),
        ({"token_ids": [[2, None]]}, "row 2, field token_ids: null in a list of ids"),
        ({"prompt_ids": [-1]}, "row 2, field prompt_ids: -1 in a list of ids"),
        ({"prompt_ids": "abc"}, 'row 2, field prompt_ids: "abc"; a list'),
    ],
)
def test_logged_answers_are_checked_row_by_row(changes, message, tmp_path):
    good = GOOD["train_q"]
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(good, {**good, **changes}))
    (before,) = peek(str(file), "data.path", _logged)
    assert re.search(message, before), before
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    with pytest.raises(ValueError, match=message):
        read_rows(rows, str(file), "data.path", logged)


def test_logged_answers_without_rewards_or_actions_are_left_out(tmp_path):
    row = {
        "prompt_ids": [1], "token_ids": [[2], [3], [4], []], "actions": [[5], [-1], [6], []],
        "rewards": [1.0, 1.0, 0.0, 0.0], "failures": ["", "", "late", ""],
    }  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(lines(row))
    (found,) = load_log(str(tmp_path))
    assert (found.token_ids.tolist(), found.actions.tolist(), found.reward) == ([2], [5], 1.0)


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no .jsonl, .json, .parquet, .csv or .txt file in this folder; put one in it"),
        ({"a.xls": b"x"}, "no .jsonl, .json, .parquet, .csv or .txt file in this folder"),
        ({"a.jsonl": "folder"}, "a.jsonl is a folder; remove it"),
        ({"a.jsonl": "link"}, "a.jsonl is a broken link; remove it"),
        ({"a.jsonl": "good", "b.parquet": parquet({"x": [1]})}, "has files of json and parquet; keep one kind"),
        ({"a.jsonl": "good", "b.jsonl": b"{\n"}, "b.jsonl, line 1: not JSON"),
        ({"a.jsonl": "good", "b.jsonl": lines({"prompt": "x"})}, "b.jsonl"),
        (
            {"a.jsonl": "good", "b.jsonl": lines({"question": {"a": 1}, "answer": "2"})},
            "b.jsonl, row 1, field question",
        ),
        ({"a.jsonl": "good", "b.jsonl": lines({"question": 1, "answer": "2"})}, "b.jsonl, row 1, field question"),
        ({"a.jsonl": "good", "b.jsonl": lines({"question": "x", "answer": None})}, "b.jsonl, row 1, field answer"),
        ({"a.jsonl": b"", "b.jsonl": b"\n"}, "a.jsonl has no rows"),
    ],
)  # fmt: skip
def test_a_folder_is_read_file_by_file(files, message, tmp_path):
    for name, content in files.items():
        if content == "folder":
            (tmp_path / name).mkdir()
        elif content == "link":
            (tmp_path / name).symlink_to("/nowhere/at/all")
        else:
            (tmp_path / name).write_bytes(lines(GOOD["gsm8k"]) if content == "good" else content)
    for line in every_line(str(tmp_path), READERS["gsm8k"]):
        assert message in line


def test_rows_behind_the_first_ones_are_looked_at_as_well(tmp_path):
    good = GOOD["gsm8k"]
    for name, wrong in (("a", good), ("b", {**good, "answer": "none"})):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(*[good] * 700, wrong))
    for line in every_line(str(tmp_path), READERS["gsm8k"]):
        assert "b.jsonl, row 701, field answer: no number in" in line


def test_what_is_whole_is_read(tmp_path):
    good = GOOD["gsm8k"]
    whole = {
        "crlf.jsonl": lines(good, good).replace(b"\n", b"\r\n"), "gap.jsonl": b"\n" + lines(good, b"", good),
        "marked.json": b"\xef\xbb\xbf" + json.dumps([good, good], indent=2).encode(),
        "two.parquet": parquet({name: [value] * 2 for name, value in good.items()}),
        "long.jsonl": lines(good, {**good, "question": "x" * 3_000_000}),
        "unicode.jsonl": lines(good, {**good, "question": "\u2028 \x85 \U0001f600 \\ud83d"}),
        "pair.jsonl": lines(good) + b'{"question": "\\ud83d\\ude00", "answer": "#### 2"}\n',
    }  # fmt: skip
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
        path = str(tmp_path / name)
        assert peek(path, "task.path", Gsm8k.read) == []
        assert len(read_rows(open_rows(path, "task.path"), path, "task.path", Gsm8k.read)) == 2, name


def test_lines_of_text_are_all_read(tmp_path):
    """Also where carriage returns, alone, end lines for one reader and not for another."""
    (tmp_path / "a.txt").write_bytes("one\rtwo\n\nthree\u2028four\r\nfive".encode())
    path = str(tmp_path / "a.txt")
    assert peek(path, "data.path", READERS["texts"]) == []
    read = read_rows(open_rows(path, "data.path"), path, "data.path", READERS["texts"])
    assert "".join(read).replace("\u2028", "") == "onetwothreefourfive"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_rights_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD["gsm8k"]))
    (tmp_path / "a.jsonl").chmod(0)
    (line,) = peek(str(tmp_path), "task.path", Gsm8k.read)
    assert "Permission denied" in line


def test_tasks_say_the_same(tmp_path):
    """Through what a job makes of its settings."""
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(GOOD["gsm8k"]) + b'{"question": "q", "answer": "\\udc00"}\n')
    with pytest.raises(ValueError, match=r"task.path = .*train.jsonl': train.jsonl, line 2: half a surrogate pair"):
        make_task(TaskConfig(name="gsm8k", path=str(tmp_path)), 0)


# --- CSV ------------------------------------------------------------------------------------------------------------

CSV = {
    "empty": (b"", "empty; a header with the names of columns"),
    "no rows": (b"a,y\n", "no rows below the header; one or more"),
    "a longer row": (b"a,y\n1,x\n1,2,3\n", "row 2: 3 cells, and the header has 2; fix or remove it"),
    "a shorter row": (b"a,b,y\n1,2,x\n\n1\n", "row 2: 1 cells, and the header has 3"),
    "a column twice": (b"y,y,a\nx,x,1\n", "field y: there are two columns of this name; rename one"),
    "a column without a name": (b"a,,y\n1,2,x\n", "column 2 of the header has no name"),
    "Latin-1": (b"a,y\n\xe9,x\n", r"line 2: not UTF-8 \(byte 1 is 0xe9\); save it as UTF-8"),
    "UTF-16": ("a,y\n1,x\n".encode("utf-16"), "line 1: not UTF-8"),
    "zero bytes": (b"a,y\n1,\0\n", "line 2: has a zero byte"),
    "gzip": (gzip.compress(b"a,y\n1,x\n")[:-4], "line 1: not UTF-8|line 1: has a zero byte"),
    "an open quote": (b'a,y\n1,z\n"1,x\n2,z\n', "row 2: not CSV .*; fix or remove it"),
    "a cell without end": (b"a,y\n" + b"9" * 200_000 + b",x\n", "row 1: not CSV .*field larger"),
    "infinity": (b"a,y\n1,x\ninf,z\n", "row 2, field a: inf is not a finite number"),
    "1e999": (b"a,y\n1,x\n1e999,z\n", "row 2, field a: 1e999 is not a finite number"),
    "other separators": (b"a;y\n1;x\n2,5;z\n", "row 2: 2 cells, and the header has 1; columns are separated by commas"),
}


@pytest.mark.parametrize("name", CSV)
def test_a_broken_table_is_named_with_row_and_field(name, tmp_path):
    content, message = CSV[name]
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=f"^task.path = .*t.csv': .*({message})") as caught:
        read_csv(str(tmp_path / "t.csv"), "y", 600)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n", "has the columns a, b"), (b"a,y\n1,x\n2,x\n", "has 1 classes"),
        (b"a,y\n1,\n2,NA\n", "has 0 classes"),
        (b"y\nx\nx\nz\nz\n", "0 other columns"), (b"a,y\n1,x\n2,x\n3,z\n", "two rows or more each"),
    ],
)  # fmt: skip
def test_a_table_with_nothing_to_tell_apart_is_named(content, message, tmp_path):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=f"^task.options.target = 'y': .*{message}"):
        read_csv(str(tmp_path / "t.csv"), "y", 600)


def test_a_missing_table_is_named_before_anything_starts(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(ValueError, match=r"^task.path = .*: cannot be read \(.*\); name a CSV file"):
            read_csv(str(path), "y", 600)
    config = override(Config(), {"task.name": "data_science", "task.path": str(tmp_path / "none.csv")})
    (line,) = inspection.faults(config.task)
    assert line.startswith("task.path = ")


def test_tables_of_any_honest_form_are_read(tmp_path):
    forms = {
        "bom": b"\xef\xbb\xbfa,y\n1,x\n3,z\n1,x\n3,z\n", "crlf": b"a,y\r\n1,x\r\n3,z\r\n1,x\r\n3,z\r\n",
        "quoted": b'a,y\n"1","x"\n"3","z"\n1,x\n3,z\n', "spaces": b"a, y\n1, x\n3 ,z\n 1,x\n3,z \n",
        "gap": b"a,y\n1,x\n\n3,z\n1,x\n3,z\n",
    }  # fmt: skip
    for name, content in forms.items():
        (tmp_path / f"{name}.csv").write_bytes(content)
        table = read_csv(str(tmp_path / f"{name}.csv"), "y", 600)
        found = sorted(zip(table.x[:, 0].tolist(), table.y.tolist(), strict=True))
        assert found == [(1, 0), (1, 0), (3, 1), (3, 1)], name
