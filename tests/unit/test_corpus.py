"""Corpora on disk: the order of documents, shards, rows made on the fly, and tokenisation that is killed."""

import collections
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import words
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cola_ray.learner import packed, shards
from cola_ray.learner.corpus import document, encoded, load_documents
from cola_ray.learner.packed import Bundles, Pool, ShardedRows, best_fit, count_rows, pieces_of
from cola_ray.learner.shards import TEXT, Documents, ShardWriter
from cola_ray.learner.shuffle import dealt, shuffled
from cola_ray.learner.tokenise import counted_rows, tokenise
from cola_ray.settings.config import DataConfig
from cola_ray.tasks import parts as parts_module
from cola_ray.tasks.chat import ChatTokenizer
from cola_ray.tasks.parts import Part, parts_of, read_part

ROOT = Path(__file__).parents[2]

# --- the order ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**31), st.integers(0, 9))
def test_a_shuffle_is_a_bijection(count, seed, epoch):
    assert sorted(shuffled(np.arange(count), count, seed, epoch)) == list(range(count))


@pytest.mark.parametrize("count", [255, 256, 257, 65_535, 65_536, 65_537, 1 << 18])
def test_a_shuffle_is_a_bijection_around_powers_of_two(count):
    assert np.array_equal(np.sort(shuffled(np.arange(count), count, 3)), np.arange(count))


def test_a_shuffle_of_any_size_answers_for_single_places():
    count = 3_000_000_000_017
    places = np.array([0, 1, 12_345_678_901, count - 1])
    whole = shuffled(places, count, 1)
    assert [int(shuffled(places[i : i + 1], count, 1)[0]) for i in range(4)] == whole.tolist()
    assert ((whole >= 0) & (whole < count)).all()
    assert shuffled(places, count, 2).tolist() != whole.tolist()


@pytest.mark.parametrize("count", [3, 5, 100, 256])
def test_every_document_comes_to_every_place_equally_often(count):
    """Pearson's chi-squared over (document, place) of many seeds, and of neighbours' distances: p > 1e-4."""
    seeds = 400 if count > 10 else 240
    orders = np.stack([shuffled(np.arange(count), count, seed) for seed in range(seeds)])
    for place in (0, count // 2, count - 1):
        assert stats.chisquare(np.bincount(orders[:, place], minlength=count)).pvalue > 1e-4
    steps = (orders[:, 1] - orders[:, 0]) % count
    assert stats.chisquare(np.bincount(steps, minlength=count)[1:]).pvalue > 1e-4


def test_all_orders_of_four_are_equally_likely():
    orders = collections.Counter(tuple(shuffled(np.arange(4), 4, seed).tolist()) for seed in range(480))
    assert len(orders) == 24
    assert stats.chisquare(list(orders.values())).pvalue > 1e-4


def test_orders_stay_what_they_were():
    """A run that is resumed with another version goes on in the same order."""
    assert shuffled(np.arange(10), 10, 0).tolist() == [4, 3, 5, 2, 8, 1, 0, 7, 6, 9]
    assert shuffled(np.array([0, 10**9]), 3 * 10**9, 7, 1).tolist() == [2168489798, 1950856393]
    owners, numbers = dealt(np.arange(8), [2.0, 1.0, 1.0])
    assert owners.tolist() == [2, 0, 1, 0, 2, 0, 1, 0]
    assert numbers.tolist() == [0, 0, 0, 1, 1, 2, 1, 3]


def test_epochs_and_seeds_are_shuffled_apart():
    orders = [shuffled(np.arange(2000), 2000, *key) for key in ((0, 0), (0, 1), (1, 0), (0,), (1,))]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).mean() < 0.01
        assert abs(stats.spearmanr(one, other).statistic) < 0.1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(0, 10**10))
def test_mixtures_are_exact_and_number_every_owners_rows(shares, far):
    owners, numbers = dealt(np.arange(3000), shares)
    for owner, share in enumerate(shares):
        mine = numbers[owners == owner]
        assert np.array_equal(mine, np.arange(len(mine)))
        taken = np.cumsum(owners == owner)
        assert np.abs(taken - np.arange(1, 3001) * share / sum(shares)).max() <= len(shares) + 0.01
    there = dealt(np.arange(far, far + 5), shares)
    again = dealt(np.array([far + 3]), shares)
    assert (int(there[0][3]), int(there[1][3])) == (int(again[0][0]), int(again[1][0]))


# --- packing ------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60), st.randoms())
def test_best_fit_places_all_and_as_many_rows_in_any_order(lengths, random):
    rows = best_fit(lengths, 40)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(sum(lengths[piece] for piece in row) <= 40 for row in rows)
    mixed = random.sample(lengths, len(lengths))
    assert sorted(sorted(lengths[p] for p in row) for row in rows) == sorted(
        sorted(mixed[p] for p in row) for row in best_fit(mixed, 40)
    )
    least = -(-sum(lengths) // 40)
    assert len(rows) <= 1.5 * least + 1


def test_texts_are_cut_pairs_end_and_long_prompts_are_left_out():
    lengths, prompts = np.array([10, 4, 9, 9, 1, 12]), np.array([TEXT, TEXT, 2, 4, TEXT, 3])
    documents, starts, pieces = pieces_of(lengths, prompts, 4)
    assert list(zip(documents.tolist(), starts.tolist(), pieces.tolist(), strict=True)) == [
        (0, 0, 4), (0, 4, 4), (0, 8, 2), (1, 0, 4), (2, 0, 4), (5, 0, 4),
    ]  # fmt: skip


# --- shards and rows ----------------------------------------------------------------------------------------------


def write_shards(folder, documents, sizes, small=True):
    """A folder of shards of these (ids, prompt_tokens), with so many documents each."""
    folder.mkdir(parents=True)
    parts, left = [], iter(documents)
    for number, size in enumerate(sizes):
        some = list(itertools.islice(left, size))
        path = folder / f"part-{number:06d}.arrow"
        with ShardWriter(path, small) as writer:
            for one in some:
                writer.add(*one)
        parts.append({"file": path.name, "documents": len(some), "tokens": writer.tokens,
                      "texts": sum(prompt == TEXT for _, prompt in some), "rows": len(some), "broken": 0})  # fmt: skip
    (folder / shards.MANIFEST).write_text(json.dumps({"fingerprint": folder.name, "source": "x", "parts": parts}))
    return folder


def some_documents(count, seed=0, pairs=False, longest=30):
    """Ids tell the document and the place: 1000 document + place."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, longest, count)
    prompts = [int(random.integers(1, length)) if pairs else TEXT for length in lengths]
    return [([1000 * index + place for place in range(length)], prompt)
            for index, (length, prompt) in enumerate(zip(lengths.tolist(), prompts, strict=True))]  # fmt: skip


@pytest.mark.parametrize("small", [True, False])
def test_shards_give_back_what_they_were_given(tmp_path, small, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN", 2)
    monkeypatch.setattr(shards, "_TOUCHED", 7)
    monkeypatch.setattr(shards, "_BUFFERED", 50)
    top = 65_535 if small else 2**32 - 1
    written = [([*ids, top], prompt) for ids, prompt in some_documents(60, pairs=True)]
    documents = Documents([write_shards(tmp_path / "a", written[:40], [13, 0, 20, 7], small),
                           write_shards(tmp_path / "b", written[40:], [20], small)])  # fmt: skip
    assert len(documents) == 60
    assert documents.are_pairs
    assert documents.tokens == sum(len(ids) for ids, _ in written)
    numbers = np.random.default_rng(1).integers(0, 60, 200)
    lengths, prompts = documents.lengths(numbers)
    assert lengths.tolist() == [len(written[number][0]) for number in numbers]
    assert prompts.tolist() == [written[number][1] for number in numbers]
    found = {index: ids.tolist() for index, ids in documents.read(numbers)}
    assert [found[index] for index in range(200)] == [written[number][0] for number in numbers]
    assert not [path for path in tmp_path.rglob(".*")], "no staging files are left"


def test_an_exception_leaves_no_shard(tmp_path):
    def write():
        with ShardWriter(tmp_path / "part-0.arrow", small=True) as writer:
            writer.add([1, 2], TEXT)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert not list(tmp_path.iterdir())


def pool_of(folder, seed=0, length=40):
    bundles = Bundles(Documents([folder]), seed, length)
    return Pool(bundles, np.array(count_rows(bundles, 0, len(bundles))))


def documents_in(rows):
    """The documents of packed rows, (first id, ids, ids that are learned) each, in the order of rows."""
    found = []
    for ids, positions, mask in zip(rows.input_ids, rows.position_ids, rows.loss_mask, strict=True):
        for start, end in itertools.pairwise([*np.flatnonzero(positions == 0).tolist(), len(ids)]):
            if ids[start] != 9:  # padding
                assert positions[start:end].tolist() == list(range(end - start))
                assert not mask[end - 1]
                learned = [int(ids[place + 1]) for place in range(start, end - 1) if mask[place]]
                found.append((ids[start:end].tolist(), learned))
    return found


def test_an_epoch_has_every_document_once_and_the_next_another_order(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "_BUNDLE_ROWS", 16)
    written = some_documents(700)
    pool = pool_of(write_shards(tmp_path / "a", written, [200, 500], small=False))
    assert len(pool.bundles) > 5
    rows = ShardedRows([pool], [1.0], pad_id=9, response_only=False)
    epochs = [documents_in(rows.read(np.arange(epoch * pool.rows, (epoch + 1) * pool.rows))) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(ids for ids, _ in epoch) == sorted(ids for ids, _ in written)
        assert all(learned == ids[1:] for ids, learned in epoch)
    assert epochs[0] != epochs[1]
    order = [ids[0] // 1000 for ids, _ in epochs[0]]
    assert abs(stats.spearmanr(order, range(700)).statistic) < 0.15, "shuffled over the whole corpus"
    fill = sum(len(ids) for ids, _ in written) / (pool.rows * 40)
    assert fill > 0.93


def test_responses_alone_are_learned(tmp_path):
    written = some_documents(90, pairs=True)
    rows = ShardedRows([pool_of(write_shards(tmp_path / "a", written, [90], small=False))], [1.0], 9, True)
    prompts = {ids[0]: prompt for ids, prompt in written}
    for ids, learned in documents_in(rows.read(np.arange(rows.pools[0].rows))):
        assert learned == ids[max(prompts[ids[0]], 1) :]


@pytest.mark.parametrize("pairs", [True, False])
def test_steps_of_responses_are_counted_from_their_first_token(tmp_path, pairs):
    written = some_documents(90, pairs=pairs)
    rows = ShardedRows([pool_of(write_shards(tmp_path / "a", written, [90], small=False))], [1.0], 9, False)
    prompts = {ids[0]: prompt if pairs else 1 for ids, prompt in written}
    read, seen = rows.read(np.arange(rows.pools[0].rows)), 0
    for ids, positions, steps in zip(read.input_ids, read.position_ids, read.steps, strict=True):
        for start in np.flatnonzero(positions == 0):
            if ids[start] != 9:
                length = next((n for n in range(1, len(ids) - start) if positions[start + n] == 0), len(ids) - start)
                first = max(prompts[ids[start]], 1)  # the token that step 0 gives
                assert steps[start : start + length].tolist() == [place + 1 - first for place in range(length)]
                seen += 1
    assert seen == len(written)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_order_is_the_same_on_any_number_of_ranks_and_after_a_stop(tmp_path, ranks):
    """And where pools are mixed: one source has 50 documents and a quarter of the rows."""

    def opened():
        folders = [tmp_path / name for name in "ab"]
        return ShardedRows([pool_of(folder, seed=4) for folder in folders], [3.0, 1.0], 9, False)

    write_shards(tmp_path / "a", some_documents(300), [300], small=False)
    write_shards(tmp_path / "b", [([10**6 + one for one in ids], TEXT) for ids, _ in some_documents(50)], [50],
                 small=False)  # fmt: skip
    alone = opened()
    whole = [alone.read(alone.step_indices(4, step, 12)) for step in range(20)]
    for step in (0, 7, 19):
        parts = [opened() for _ in range(ranks)]
        found = [rows.read(rows.step_indices(4, step, 12)[rank::ranks]) for rank, rows in enumerate(parts)]
        for rank, part in enumerate(found):
            for name in ("input_ids", "position_ids", "loss_mask", "steps"):
                assert np.array_equal(getattr(part, name), getattr(whole[step], name)[rank::ranks])
    of_b = sum(int((rows.input_ids[:, 0] >= 10**6).sum()) for rows in whole)
    assert of_b == 20 * 12 // 4


# --- tokenisation -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat():
    return ChatTokenizer(words(), "2026-01-01")


def lines_of(count, seed=0):
    random = np.random.default_rng(seed)
    return [" ".join(f"w{word}" for word in random.integers(3, 90, random.integers(1, 30))) for _ in range(count)]


def tokenised(data, chat, cache, **options):
    said = []
    folders = tokenise(data, chat, cache, said.append, **options)
    return folders, said


def contents(folders):
    documents = Documents(folders)
    numbers = np.arange(len(documents))
    found = dict(documents.read(numbers))
    prompts = documents.lengths(numbers)[1].tolist()
    return [(found[index].tolist(), prompts[index]) for index in range(len(documents))]


def test_parts_of_lines_are_the_file_wherever_it_is_cut(tmp_path):
    texts = ["a", "", "b" * 50, "ä" * 9, "c"]
    file = tmp_path / "x.txt"
    file.write_text("\n".join(texts))
    size = file.stat().st_size
    for cut in range(1, size):
        parts = [Part("x", "text", str(file), 0, cut), Part("x", "text", str(file), cut, size)]
        assert [row["text"] for part in parts for row in read_part(part)] == texts


def test_parquet_and_lists_have_parts(tmp_path):
    rows = [{"text": f"w{number}", "other": number} for number in range(30)]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=7)
    (tmp_path / "x.json").write_text(json.dumps(rows))
    parts = parts_of(str(tmp_path / "x.parquet"))
    assert [row for part in parts for row in read_part(part, ["text"])] == [{"text": row["text"]} for row in rows]
    assert sum(part.end - part.first for part in parts) == 5
    assert [row for part in parts_of(str(tmp_path / "x.json")) for row in read_part(part)] == rows


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_ids_are_streamed_or_fetched_and_cut_alike(tmp_path, chat, monkeypatch, streaming):
    """A folder stands for the hub, which ``datasets`` opens in the same way."""
    rows = [{"text": text} for text in lines_of(20)]
    (tmp_path / "in").mkdir()
    for number in range(4):
        some = rows[5 * number : 5 * number + 5]
        (tmp_path / "in" / f"{number}.jsonl").write_text("\n".join(map(json.dumps, some)))
    for module in ("tasks.parts", "tasks.rows", "learner.tokenise"):
        monkeypatch.setattr(f"cola_ray.{module}.is_local", lambda _: False)
    monkeypatch.setattr(parts_module, "_TABLE_ROWS", 7)
    source = str(tmp_path / "in")
    parts = parts_of(source, streaming)
    assert len(parts) == (4 if streaming else 3)
    assert [row for part in parts for row in read_part(part)] == rows
    data = DataConfig(path=source, streaming=streaming, processes=1)
    found = contents(tokenised(data, chat, tmp_path / "cache")[0])
    assert found == [encoded(row["text"], chat) for row in rows]


def test_shards_have_what_the_file_says(tmp_path, chat):
    """The ids of each row, tokenised here, in the file's order; and a second run has nothing to do."""
    texts = lines_of(300)
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.jsonl").write_text(
            "\n".join(json.dumps({"text": text}) for text in texts[number * 100 : (number + 1) * 100])
        )
    data = DataConfig(path=str(tmp_path / "in" / "*.jsonl"))
    folders, said = tokenised(data, chat, tmp_path / "cache")
    wanted = [encoded(document({"text": text}, data), chat) for text in texts]
    assert contents(folders) == wanted
    assert any("tokenising" in line and "3 of 3 parts" in line for line in said)
    assert tokenised(data, chat, tmp_path / "cache") == (folders, [])
    bundles = Bundles(Documents(folders), 0, 64)
    counts = counted_rows(bundles, folders, tmp_path / "cache", 1, said.append)
    assert counts.tolist() == count_rows(bundles, 0, len(bundles))
    changed = tmp_path / "in" / "0.jsonl"
    changed.write_text(changed.read_text().replace("w3 ", "w4 "))
    assert tokenised(data, chat, tmp_path / "cache")[0] != folders


def test_what_the_chat_template_is_told_is_told_to_all_processes(tmp_path):
    """Ids with another switch are another corpus, whoever tokenises."""
    (tmp_path / "in").mkdir()
    for number in range(2):
        row = {"question": f"w{number + 3}", "answer": "w9"}
        (tmp_path / "in" / f"{number}.jsonl").write_text(json.dumps(row))
    of_model = words()
    of_model.chat_template = "{% for m in messages %}{{ m.content }} {% if loud %}w50 {% endif %}{% endfor %}"
    found = {}
    for loud, processes in itertools.product((True, False), (1, 2)):
        data = DataConfig(path=str(tmp_path / "in"), processes=processes, chat_options={"loud": loud})
        chat = ChatTokenizer(of_model, "2026-01-01", data.chat_options)
        folders, _ = tokenised(data, chat, tmp_path / f"cache-{processes}")
        found[loud, processes] = contents(folders)
    loud_word = of_model.convert_tokens_to_ids("w50")
    assert found[True, 1] == found[True, 2] != found[False, 1] == found[False, 2]
    assert all(loud_word in ids for ids, _ in found[True, 1])
    assert not any(loud_word in ids for ids, _ in found[False, 1])


def test_parts_that_were_cut_in_another_way_are_made_again(tmp_path, chat):
    texts = [" ".join(lines_of(40, seed)) for seed in range(1000)]
    file = tmp_path / "x.txt"
    file.write_text("\n".join(texts))
    assert file.stat().st_size > 2 << 20
    data, wanted = DataConfig(path=str(file), processes=1), [encoded(text, chat) for text in texts]
    (folder,), _ = tokenised(data, chat, tmp_path / "cache", part_mb=1)
    assert len(shards.read_manifest(folder)["parts"]) == 3
    (folder / shards.MANIFEST).unlink()
    assert tokenised(data, chat, tmp_path / "cache", part_mb=2)[0] == [folder]
    assert contents([folder]) == wanted


def test_pairs_are_those_of_the_reader_in_memory(tmp_path, chat):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps({"question": q, "answer": a})
                              for q, a in zip(lines_of(40), lines_of(40, 1), strict=True)))  # fmt: skip
    data = DataConfig(path=str(file))
    wanted, _ = load_documents(data, None, chat, 10_000)
    found = contents(tokenised(data, chat, tmp_path / "cache")[0])
    assert [(ids, own.index(True)) for ids, own in wanted] == found


def test_broken_rows_are_named_counted_and_left_out_where_they_may_be(tmp_path, chat):
    file = tmp_path / "rows.jsonl"
    good = [json.dumps({"text": text}) for text in lines_of(8)]
    file.write_text("\n".join([*good[:4], "", "{no", *good[4:], '{"text": 7}']))
    with pytest.raises(ValueError, match=r"rows.jsonl': row 5 \(line 6\): not JSON .*\(2 of 10 rows are wrong\)"):
        tokenised(DataConfig(path=str(file)), chat, tmp_path / "cache")
    folders, said = tokenised(DataConfig(path=str(file), max_broken=0.2), chat, tmp_path / "cache")
    assert any("2 of 10 rows are broken and left out, the first: row 5 (line 6): not JSON" in line for line in said)
    assert len(contents(folders)) == 8
    (part,) = shards.read_manifest(folders[0])["parts"]
    assert [number for number, _ in part["first_broken"]] == [5, 10]
    with pytest.raises(ValueError, match="2 of 10"):
        tokenised(DataConfig(path=str(file), max_broken=0.1), chat, tmp_path / "cache")


def test_broken_rows_of_a_csv_file_are_left_out_and_the_rest_is_read(tmp_path, chat):
    file = tmp_path / "rows.csv"
    file.write_text("text,by\n" + "\n".join(f"{text},me" for text in lines_of(4)) + "\nalone\nlast,me\n")
    with pytest.raises(
        ValueError, match=r"data.path = .*rows.csv': row 5: 1 cells, and the header has 2; fix or remove"
    ):
        tokenised(DataConfig(path=str(file)), chat, tmp_path / "cache")
    folders, said = tokenised(DataConfig(path=str(file), max_broken=0.2), chat, tmp_path / "cache")
    assert any("1 of 6 rows are broken and left out, the first: row 5: 1 cells" in line for line in said)
    assert len(contents(folders)) == 5
    file.write_text('text\n"open\n')
    with pytest.raises(ValueError, match=r"^data.path = .*: rows.csv: row 1: not CSV"):
        tokenised(DataConfig(path=str(file), max_broken=0.5), chat, tmp_path / "cache")


def test_a_killed_tokenisation_goes_on_with_the_parts_that_are_missing(tmp_path, chat):
    """SIGKILL to the process that tokenises; its children end, too, and nothing is left of the part they were at."""
    (tmp_path / "in").mkdir()
    for number in range(12):
        (tmp_path / "in" / f"{number:02d}.txt").write_text("\n".join(lines_of(3000, number)))
    data = DataConfig(path=str(tmp_path / "in"), processes=2)
    (tmp_path / "chat").write_bytes(pickle.dumps(chat))
    program = (
        "import pickle, sys; from pathlib import Path; from cola_ray.learner.tokenise import tokenise;"
        "from cola_ray.settings.config import DataConfig; chat, source, cache = map(Path, sys.argv[1:]);"
        "tokenise(DataConfig(path=str(source), processes=2), pickle.loads(chat.read_bytes()), cache, print)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, tmp_path / "chat", data.path, tmp_path / "cache"],
                               env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 240
    while len(list((tmp_path / "cache").rglob("part-*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("part-*.json")}
    assert 2 <= len(before) < 12
    assert not list((tmp_path / "cache").rglob(shards.MANIFEST))
    folders, _ = tokenised(data, chat, tmp_path / "cache")
    assert all(path.stat().st_mtime_ns == when for path, when in before.items()), (
        "parts that were there are not made again"
    )
    wanted = [encoded(text, chat) for number in range(12) for text in lines_of(3000, number)]
    assert contents(folders) == wanted
    assert not list(folders[0].glob(".part-*"))


@pytest.mark.usefixtures("one_rank")
def test_stages_read_what_the_first_rank_has_tokenised(tmp_path, chat):
    """Two sources, of which one is a glob, mixed and among each other; stages that need pairs refuse texts."""
    from cola_ray.learner.pretrain import _load_rows
    from cola_ray.settings.config import override
    from cola_ray.settings.presets import preset

    for name in ("a.txt", "b1.txt", "b2.txt"):
        (tmp_path / name).write_text("\n".join(lines_of(30, len(name))))
    given = {"data.path": str(tmp_path / "a.txt"), "data.more_paths": (str(tmp_path / "b*.txt"),),
             "output_dir": str(tmp_path / "outputs" / "run"), "pretrain.sequence_length": 64,
             "data.processes": 1}  # fmt: skip
    config, said = override(preset("tiny"), given), []
    report = type("Report", (), {"doing": staticmethod(said.append)})
    together = _load_rows(config, "actions", None, chat, report)
    assert [len(pool.bundles.documents) for pool in together.pools] == [90]
    assert said[-1].startswith("actions: tokenising")
    apart = override(config, {"data.weights": (1.0, 3.0), "data.cache": str(tmp_path / "outputs" / "corpus")})
    del said[:]
    mixed = _load_rows(apart, "policy", None, chat, report)
    assert said == [], "nothing is tokenised twice"
    assert [len(pool.bundles.documents) for pool in mixed.pools] == [30, 60]
    assert mixed.read(mixed.step_indices(0, 0, 8)).input_ids.shape == (8, 64)
    with pytest.raises(ValueError, match="fta_idm needs prompt/response pairs"):
        _load_rows(config, "fta_idm", None, chat, report)
