"""States of the frozen base on disk: what is read is what was written, and training does not notice."""

import gc
import json
import os
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from conftest import NUM_ACTIONS, VOCAB_SIZE, small_base, words

from cola_ray.learner import states
from cola_ray.learner.corpus import pack
from cola_ray.learner.packed import Bundles, Pool, ShardedRows
from cola_ray.learner.pretrain import CorpusStage
from cola_ray.learner.shards import Documents
from cola_ray.learner.stage_module import StageModule
from cola_ray.learner.states import NOTHING_KEPT, TokenStore, digest_of_weights, kept_states
from cola_ray.learner.tokenise import counted_rows, tokenise
from cola_ray.model.modeling_cola import CoLAForCausalLM
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset
from cola_ray.tasks.chat import ChatTokenizer

LENGTH = 24


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 5), (torch.bfloat16, 5), (torch.int16, 1)])
def test_pieces_are_read_as_they_were_written(tmp_path, monkeypatch, dtype, width):
    monkeypatch.setattr(states, "TOKENS_A_FILE", 8)  # pieces begin in several files and go over their ends
    pieces = {at: torch.randn(n, width).mul(100).to(dtype) for at, n in ((0, 7), (7, 4), (11, 13), (24, 1), (300, 2))}
    store = TokenStore(tmp_path, width, dtype)
    for at, piece in pieces.items():
        store.write(at, piece)
    for reader in (store, TokenStore(tmp_path, width, dtype)):
        for at, piece in pieces.items():
            found = torch.empty_like(piece)
            assert reader.read(at, found)
            assert torch.equal(found, piece)
        for at, length in ((1, 6), (25, 1), (1000, 3), (0, 6), (0, 8)):  # no piece begins there, or one of that length
            assert not reader.read(at, torch.empty(length, width, dtype=dtype))


def test_a_damaged_piece_is_none(tmp_path):
    store, piece = TokenStore(tmp_path, 3, torch.float32), torch.randn(4, 3)
    store.write(5, piece)
    with (tmp_path / "000000.values").open("r+b") as file:
        file.seek(5 * 12 + 7)
        file.write(b"x")
    assert not store.read(5, torch.empty(4, 3))
    store.write(5, piece)
    assert store.read(5, torch.empty(4, 3))
    os.truncate(tmp_path / "000000.values", 6 * 12)
    assert not store.read(5, torch.empty(4, 3))


def test_no_more_files_are_open_than_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(states, "TOKENS_A_FILE", 1)
    gc.collect()  # what earlier tests left open
    before = len(os.listdir("/proc/self/fd"))
    store = TokenStore(tmp_path, 1, torch.int16)
    for at in range(200):
        store.write(at, torch.full((1, 1), at, dtype=torch.int16))
    assert len(os.listdir("/proc/self/fd")) - before <= 2 * states._OPEN
    found = torch.empty(1, 1, dtype=torch.int16)
    assert [store.read(at, found) and int(found) for at in range(200)] == list(range(200))
    del store
    assert len(os.listdir("/proc/self/fd")) <= before


# --- training -------------------------------------------------------------------------------------------------------


def in_memory():
    draw = np.random.default_rng(0)
    documents = [(draw.integers(3, VOCAB_SIZE, n).tolist(), [True] * n) for n in draw.integers(2, LENGTH + 1, 17)]
    return pack(documents, LENGTH, 0, response_only=False)


def on_disk(folder):
    """Pairs and texts, some longer than a row, in two pools."""
    folder.mkdir()
    draw, tokenizer = np.random.default_rng(1), words()
    chat = ChatTokenizer(tokenizer, "2026-01-01")

    def text(n):
        return " ".join(f"w{token}" for token in draw.integers(3, VOCAB_SIZE, n))

    pairs = [{"question": text(int(n)), "answer": text(3)} for n in draw.integers(1, 12, 15)]
    texts = [{"text": text(int(n))} for n in draw.integers(2, 70, 12)]
    pools = []
    for name, rows in (("pairs", pairs), ("texts", texts)):
        file = folder / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        data = preset("tiny").data.model_copy(update={"path": str(file), "processes": 1})
        made = tokenise(data, chat, folder / "cache", lambda _: None)
        bundles = Bundles(Documents(made), 0, LENGTH)
        pools.append(Pool(bundles, counted_rows(bundles, made, folder / "cache", 1, lambda _: None)))
    return ShardedRows(pools, (3.0, 1.0), 0, response_only=True)


def settings(folder, **changes):
    return override(preset("tiny"), {
        "model.num_actions": NUM_ACTIONS, "pretrain.batch_size": 4, "pretrain.micro_batch_size": 2,
        "pretrain.sequence_length": LENGTH, "pretrain.balance_coef": 0.0, "output_dir": str(folder / "run"),
    } | {f"pretrain.{name}": value for name, value in changes.items()})  # fmt: skip


def trained(config, stage, rows, source, steps, watched=None):
    """Losses of the steps, and what has trained."""
    model = CoLAForCausalLM.from_pretrained(source)
    kept = kept_states(config, stage, source, rows)
    learner = CorpusStage(config, stage, StageModule(model, stage, config), rows, [], kept)
    runs = {"base": 0, "idm": 0}
    model.model.layers[0].register_forward_hook(lambda *_: runs.update(base=runs["base"] + 1))
    model.idm.register_forward_hook(lambda *_: runs.update(idm=runs["idm"] + 1))
    losses = [learner.step(number, 1e-3)[f"{stage}/loss"] for number in range(steps)]
    weights = {name: one.ds_tensor.detach().clone() for name, one in learner.zero.trained}
    learner.zero.close()
    if watched is not None:
        watched.append(runs)
    return losses, weights


@pytest.mark.parametrize("stage", ["actions", "policy"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_training_from_written_states_is_the_same_bit_for_bit(where, stage, cola_dir, tmp_path, one_rank):
    """In float32, in steps that write and in those that read: without the base, and for labels without the IDM."""
    rows = in_memory() if where == "memory" else on_disk(tmp_path / "corpus")
    balance = {"balance_coef": 0.5} if stage == "actions" else {}
    steps = 5 if where == "memory" else 3  # of shards, within an epoch of the smaller pool
    plain, watched = settings(tmp_path, **balance), []
    wanted = trained(plain, stage, rows, cola_dir, steps)
    config = settings(tmp_path, states="model", **balance)
    for _ in range(2):
        losses, weights = trained(config, stage, rows, cola_dir, steps, watched)
        assert losses == wanted[0]
        for name, weight in wanted[1].items():
            assert torch.equal(weights[name], weight), name
    writing, reading = watched
    assert writing["base"] > 0
    assert reading["base"] == 0
    assert (reading["idm"] == 0) == (stage == "policy")


def test_stages_read_what_another_has_written(cola_dir, tmp_path, one_rank):
    rows, watched, config = in_memory(), [], settings(tmp_path, states="model")
    trained(config, "actions", rows, cola_dir, 4, watched)
    trained(config, "policy", rows, cola_dir, 4, watched)
    assert watched[0]["base"]
    assert not watched[1]["base"]


def test_later_epochs_of_shards_are_the_same_to_rounding(cola_dir, tmp_path, one_rank):
    """Their rows are packed anew, so that the last bits of a state are those of another neighbourhood."""
    rows, watched = on_disk(tmp_path / "corpus"), []
    steps = 3 * max(pool.rows for pool in rows.pools) // 4 * 4 // 4
    wanted, _ = trained(settings(tmp_path), "policy", rows, cola_dir, steps)
    losses, _ = trained(settings(tmp_path, states="model"), "policy", rows, cola_dir, steps, watched)
    assert watched[0]["base"] < 2 * steps, "some steps had all their states from earlier epochs"
    assert losses == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("stage", ["actions", "policy"])
def test_in_bfloat16_states_are_rounded_once(stage, cola_dir, tmp_path, one_rank):
    """By 2^-9 of a state, and a step's loss is off by less than twice that. Whoever writes trains on what is read.

    In the stage policy a label in hundreds flips, where two actions are next to equal: of 60 in a step, 1 % of it.
    """
    rows, folder = in_memory(), tmp_path
    wanted, _ = trained(settings(folder), stage, rows, cola_dir, 10)
    config = settings(folder, states="bfloat16")
    first, weights = trained(config, stage, rows, cola_dir, 10)
    second, again = trained(config, stage, rows, cola_dir, 10)
    assert first != wanted
    apart = np.abs(np.array(first) / wanted - 1)
    assert np.median(apart) < 2**-8
    assert apart.max() < (2**-8 if stage == "actions" else 0.02)
    assert first == second
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


# --- what they are known by, and where they have room ----------------------------------------------------------------


def test_other_weights_other_corpora_and_types_have_states_of_their_own(cola_dir, tmp_path, one_rank):
    rows, names = in_memory(), []
    fewer = in_memory()
    fewer.input_ids[0, 0] ^= 1
    other = shutil.copytree(cola_dir, tmp_path / "other")
    model = CoLAForCausalLM.from_pretrained(other)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    model.save_pretrained(other)
    variants = [
        ("model", rows, cola_dir),
        ("bfloat16", rows, cola_dir),
        ("model", fewer, cola_dir),
        ("model", rows, other),
    ]
    for kind, some, source in variants:
        kept = kept_states(settings(tmp_path, states=kind), "policy", source, some)
        names += [kept.states.stores[0].folder.name, kept.labels.stores[0].folder.name]
    assert len({*names}) == 2 * len(variants)


def test_what_trains_beside_the_base_does_not_change_its_digest(cola_dir, tmp_path):
    model = CoLAForCausalLM.from_pretrained(cola_dir)
    model.idm.head.weight.data += 1
    model.policy.head.weight.data += 1
    model.save_pretrained(tmp_path / "later")
    of_base, of_idm = ([digest_of_weights(where, "float32", part) for where in (cola_dir, tmp_path / "later")]
                       for part in ("model.", "idm."))  # fmt: skip
    assert of_base[0] == of_base[1]
    assert of_idm[0] != of_idm[1]
    assert of_base[0] != digest_of_weights(cola_dir, "bfloat16", "model.")


def attached(name, folder, **sizes):
    """A CoLA model in ``folder``, and the digest of its base."""
    small_base(name).save_pretrained(folder / "base")
    sizes = {"num_actions": NUM_ACTIONS, "num_idm_layers": 1, "num_policy_layers": 1} | sizes
    CoLAForCausalLM.attach(folder / "base", **sizes).save_pretrained(folder)
    return digest_of_weights(folder, "float32", "model.")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"rms_norm_eps": 1e-3}),
        ("mistral", {"sliding_window": 4}),
        ("gemma3", {"query_pre_attn_scalar": 24}),
        ("gemma3", {"layer_types": ["full_attention"] * 3}),
        ("smollm3", {"no_rope_layers": [1, 1, 1]}),
    ],
)
def test_the_same_weights_in_layers_that_compute_something_else_have_other_states(name, changes, tmp_path):
    """Whatever the family's settings are; what CoLA adds to its lists by layer is none of the base's."""
    digest = attached(name, tmp_path / "one")
    assert attached(name, tmp_path / "more", num_policy_layers=3, num_world_model_layers=1) == digest
    file = tmp_path / "one" / "config.json"
    before = json.loads(file.read_text())
    assert all(before[field] != value for field, value in changes.items())
    file.write_text(json.dumps(before | changes))
    assert digest_of_weights(tmp_path / "one", "float32", "model.") != digest


def test_what_does_not_fit_is_refused_before_the_first_step(cola_dir, tmp_path, one_rank, monkeypatch):
    rows = in_memory()
    size = rows.tokens * 64 * 4
    with pytest.raises(ValueError, match=r"pretrain.states = 'model': up to .* GB of states, and pretrain.states_gb"):
        kept_states(settings(tmp_path, states="model", states_gb=0.9 * size / 1e9), "actions", cola_dir, rows)
    config = settings(tmp_path, states="model", states_gb=1.1 * size / 1e9)
    disk = namedtuple("disk", ["free"])
    monkeypatch.setattr(states.shutil, "disk_usage", lambda _: disk(0.9 * size))
    with pytest.raises(ValueError, match=r"has room for .* name another folder with pretrain.states_cache"):
        kept_states(config, "actions", cola_dir, rows)
    monkeypatch.setattr(states.shutil, "disk_usage", lambda _: disk(1.1 * size))
    assert kept_states(config, "actions", cola_dir, rows).states is not None
    few = settings(tmp_path, states="model", states_gb=0.9 * size / 1e9, max_steps=1)  # which is all that it reads
    assert kept_states(few, "actions", cola_dir, rows).states is not None
    assert kept_states(config, "fta_idm", cola_dir, rows) is NOTHING_KEPT
