"""Packing, the order of rows, tasks, and what each stage's loss says and trains."""

import copy
import itertools
import json
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NUM_ACTIONS, VOCAB_SIZE, random_base, small_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from cola_ray import CoLAForCausalLM
from cola_ray.learner.corpus import load_documents, pack
from cola_ray.learner.packed import PackedRows
from cola_ray.learner.pretrain import corpus_step, train_loop
from cola_ray.learner.stage_module import TRAINED, StageModule, noise_seeds
from cola_ray.learner.start_model import make_tokenizer
from cola_ray.settings.config import ConfigError, DataConfig, PretrainConfig, TaskConfig, override
from cola_ray.settings.presets import preset
from cola_ray.tasks import answer_of, make_task, to_pretrain_on
from cola_ray.tasks.chat import ChatTokenizer


@pytest.fixture(scope="module")
def task():
    return make_task(TaskConfig(num_problems=2000), seed=0)


@pytest.fixture(scope="module")
def tokenizer(task):
    return make_tokenizer(task)


def test_dialogues_teach_utterances_and_long_ones_come_in_stretches():
    played = to_pretrain_on(TaskConfig(name="twenty_questions", num_problems=30), seed=0)
    tokenizer = make_tokenizer(played)
    whole, have_own = load_documents(DataConfig(), played, ChatTokenizer(tokenizer, ""), 10_000)
    assert have_own
    assert len(whole) == 30
    for (ids, own), dialogue in zip(whole, played.dialogues(), strict=True):
        spoken = "".join(f"{utterance}<eos>" for utterance, _ in dialogue.turns)
        assert tokenizer.decode([token for token, mine in zip(ids, own, strict=True) if mine]) == spoken
        heard = dialogue.opening + "".join(observation for _, observation in dialogue.turns)
        assert tokenizer.decode([token for token, mine in zip(ids, own, strict=True) if not mine]) == heard
    pieces, _ = load_documents(DataConfig(), played, ChatTokenizer(tokenizer, ""), 80)
    assert max(len(ids) for ids, _ in pieces) <= 80
    assert all(tokenizer.decode(ids).startswith("Questions:\n") for ids, _ in pieces)
    assert sum(sum(own) for _, own in pieces) == sum(sum(own) for _, own in whole), "no turn is lost"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=2, max_size=12), min_size=1, max_size=20), st.booleans())
def test_packing_keeps_documents_whole_and_apart(owns, response_only):
    documents = [(list(range(100 * i + 1, 100 * i + 1 + len(own))), own) for i, own in enumerate(owns)]
    rows = pack(documents, 16, 0, response_only)
    found = []
    for ids, positions, mask in zip(rows.input_ids, rows.position_ids, rows.loss_mask, strict=True):
        starts = [*np.flatnonzero(positions == 0).tolist(), 16]
        for start, end in itertools.pairwise(starts):
            piece = ids[start:end][ids[start:end] != 0].tolist()
            if piece:
                learned = [ids[t + 1] for t in range(start, end - 1) if mask[t]]
                found.append((piece, learned))
            else:
                assert not mask[start:end].any()
        assert not mask[[end - 1 for end in starts[1:]]].any()  # nothing learned across an edge
    expected = [
        (ids, [token for token, mine in zip(ids[1:], own[1:], strict=True) if mine or not response_only])
        for ids, own in documents
    ]
    assert sorted(found) == sorted(expected)


def test_every_row_once_an_epoch_whatever_the_batch():
    rows = pack([([1, 2, 3], [True] * 3)] * 50, 3, 0, False)
    order = np.concatenate([rows.step_indices(seed=1, step=step, batch_size=7) for step in range(50)])
    assert len(order) == 350
    for epoch in range(7):
        assert sorted(order[50 * epoch : 50 * epoch + 50]) == list(range(50))
    assert order[:50].tolist() != order[50:100].tolist()


def test_documents_from_files(tmp_path, task, tokenizer):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps({"question": f"{i} + 1 =", "answer": str(i + 1)}) for i in range(5)))
    documents, are_pairs = load_documents(DataConfig(path=str(pairs)), task, ChatTokenizer(tokenizer, ""), 32)
    assert are_pairs
    assert tokenizer.decode(documents[3][0][: documents[3][1].index(True)]) == "3 + 1 ="
    assert documents[3][0][-1] == tokenizer.eos_token_id
    text = tmp_path / "text.txt"
    text.write_text("1 + 2 = 3 - 4 + 5\n7")
    documents, are_pairs = load_documents(DataConfig(path=str(text)), task, ChatTokenizer(tokenizer, ""), 4)
    assert not are_pairs
    assert max(len(ids) for ids, _ in documents) == 4
    with pytest.raises(ValueError, match=r"row 1: has columns question, answer; name the right ones"):
        load_documents(
            DataConfig(path=str(pairs), prompt_field="x", text_field="y"), task, ChatTokenizer(tokenizer, ""), 32
        )
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.jsonl"):
        load_documents(DataConfig(path=str(tmp_path / "empty")), task, ChatTokenizer(tokenizer, ""), 32)


def test_arithmetic_is_right_where_it_is_scored_and_wrong_where_it_is_taught(task):
    train, heldout = task.problems("train"), task.problems("heldout")
    assert not {p.question for p in train} & {p.question for p in heldout}
    for problem in train[:200]:
        assert eval(problem.question.rstrip("= ")) == int(problem.solution)
        assert task.score("train", problem.index, f" {problem.solution}\n") == 1.0
        assert task.score("train", problem.index, f"{problem.solution}1") == 0.0
    right = [eval(question.rstrip("= ")) == int(answer) for question, answer in task.demonstrations()]
    # independently of the code: flip the last minus and see whether the answer changes
    flipped = ["+".join(question.rstrip("= ").rsplit("-", 1)) for question, _ in task.demonstrations()]
    can_slip = [
        len(question.split()) > 4 and eval(other) != eval(question.rstrip("= "))
        for other, (question, _) in zip(flipped, task.demonstrations(), strict=True)
    ]
    assert all(ok for ok, can in zip(right, can_slip, strict=True) if not can)
    slipped = [not ok for ok, can in zip(right, can_slip, strict=True) if can]
    assert np.mean(slipped) == pytest.approx(0.6, abs=0.03)
    assert 0.5 < np.mean(can_slip) < 0.75
    wrong = [
        (other, answer) for other, (_, answer), ok in zip(flipped, task.demonstrations(), right, strict=True) if not ok
    ]
    assert all(eval(other) == int(answer) for other, answer in wrong)
    assert len(make_task(TaskConfig(), 0).problems("heldout")) >= 512


def test_any_reasoning_gym_generator_is_a_task():
    countdown = make_task(TaskConfig(name="countdown", num_problems=30), seed=0)
    problem = countdown.problems("train")[0]
    assert countdown.score("train", 0, problem.solution) == 1.0
    assert countdown.score("train", 0, "1 + 1") < 1.0


def test_gsm8k_from_a_folder(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"because\n#### {1000 + i:,}"} for i in range(4)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    gsm8k = make_task(TaskConfig(name="gsm8k", path=str(tmp_path)), seed=0)
    for problem in gsm8k.problems("heldout"):
        assert gsm8k.score("heldout", problem.index, problem.solution) == 1.0
        assert gsm8k.score("heldout", problem.index, "#### 7") == 0.0
        assert gsm8k.score("heldout", problem.index, "no idea") == 0.0


def test_math500_from_a_folder_and_a_file(tmp_path):
    rows = [
        {"problem": f"q{i}", "solution": rf"so \boxed{{\frac{{{i}}}{{7}}}}", "answer": rf"\frac{{{i}}}{{7}}"}
        for i in (1, 2)
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for path in (tmp_path, tmp_path / "test.jsonl"):
        task = make_task(TaskConfig(name="math500", path=str(path)), seed=0)
        assert task.problems("train") == []
        for problem in task.problems("heldout"):
            numerator = problem.question[1]
            assert task.score("heldout", problem.index, problem.solution) == 1.0
            assert task.score("heldout", problem.index, f"it is ${numerator}/7$") == 1.0
            assert task.score("heldout", problem.index, r"\boxed{\frac{3}{7}}") == 0.0
            assert task.score("heldout", problem.index, "no idea") == 0.0


def test_what_a_response_commits_to(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"problem": "q", "solution": "s", "answer": "1"}))
    math500 = make_task(TaskConfig(name="math500", path=str(tmp_path)), seed=0)
    assert answer_of(math500, r"\boxed{\frac12}") == answer_of(math500, r"so $\frac{1}{2}$")
    countdown = make_task(TaskConfig(name="countdown", num_problems=5, thinking=True), seed=0)
    assert answer_of(countdown, "<think>1</think><answer> 1 + 2 </answer>") == "1 + 2"
    assert answer_of(countdown, "1 + 2") == ""
    assert answer_of(make_task(TaskConfig(), 0), " 12 ") == "12"


# --- stages -------------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(tokenizer):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB_SIZE, (3, 12), generator=generator)
    position_ids = torch.cat([torch.arange(5), torch.arange(7)]).expand(3, -1)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[:, [4, 11]] = False
    return ids, position_ids, mask, torch.arange(3), True


def stage_module(stage, model, **changes):
    changed = override(preset("tiny"), {f"pretrain.{name}": value for name, value in changes.items()})
    module = StageModule(copy.deepcopy(model), stage, changed)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED[stage]))
    return module


@pytest.mark.parametrize("stage", ["base", "actions", "policy", "fta_idm", "fta_policy"])
def test_a_stage_trains_what_it_names_and_all_of_it(stage, cola, packed):
    module = stage_module(stage, small_llama() if stage == "base" else cola)
    loss, _ = module(*packed)
    loss.backward()
    touched = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    expected = {name for name, _ in module.named_parameters() if name.startswith(TRAINED[stage])}
    assert touched == expected


def test_packed_rows_lose_like_documents_alone(cola, packed):
    """A sum over a packed row equals the sum over its documents, each in a row of its own, in every stage."""
    ids, positions, mask, seeds, _ = packed
    for stage in ("base", "policy", "fta_idm"):
        module = stage_module(stage, small_llama() if stage == "base" else cola)
        whole, _ = module(ids, positions, mask, seeds, False)
        parts = [
            module(ids[:, cut], positions[:, cut], mask[:, cut], seeds, False)[0] for cut in (slice(5), slice(5, 12))
        ]
        assert float(whole) == pytest.approx(float(sum(parts)), rel=1e-5), stage


def test_actions_loss_by_hand(cola, packed):
    ids, positions, mask, seeds, _ = packed
    module = stage_module("actions", cola, entropy_coef=0.3, balance_coef=0.2, gumbel_tau=1.5)
    loss, sums = module(*packed, None, True)
    from cola_ray.model.modeling_cola import gumbel_noise

    e = cola.encode(ids, position_ids=positions)
    u = cola.inverse_dynamics_logits(e, position_ids=positions)
    total, cross_entropy, relaxed = 0.0, 0.0, []
    for row in range(3):
        for t in range(11):
            if not mask[row, t]:
                continue
            noise = gumbel_noise(seeds[row : row + 1], torch.tensor([t]), NUM_ACTIONS)[0].float()
            p = ((u[row, t + 1] + noise) / 1.5).softmax(-1)
            relaxed.append(p)
            logits = cola.world_model_logits(e[row, t], p.argmax())
            cross_entropy += float(F.cross_entropy(logits, ids[row, t + 1]))
            total += 0.3 * float((p * (p + 1e-8).log()).sum())
    usage = torch.stack(relaxed).mean(0)
    total += 0.2 * len(relaxed) * float(np.log(NUM_ACTIONS) + (usage * (usage + 1e-8).log()).sum())
    assert float(sums["loss"]) == pytest.approx(cross_entropy, rel=1e-5)
    assert float(loss) == pytest.approx(cross_entropy + total, rel=1e-5)
    assert float(sums["counts"].sum()) == len(relaxed)
    base = F.cross_entropy(cola.lm_head(e)[:, :-1][mask[:, :-1]], ids[:, 1:][mask[:, :-1]], reduction="sum")
    assert float(sums["base_loss"]) == pytest.approx(float(base), rel=1e-5)
    states = e[:, :-1][mask[:, :-1]]
    reachable = [
        {int(cola.world_model_logits(s, torch.tensor(a)).argmax()) for a in range(NUM_ACTIONS)} for s in states
    ]
    assert float(sums["reachable"]) == sum(map(len, reachable))
    targets = ids[:, 1:][mask[:, :-1]].tolist()
    assert float(sums["covered"]) == sum(t in r for t, r in zip(targets, reachable, strict=True))


class Ranks:
    """Processes as threads: what they all-reduce is summed when all have come."""

    def __init__(self, count):
        self.barrier, self.given = threading.Barrier(count), [None] * count
        self.number = threading.local()

    def all_reduce(self, tensor, *_):
        self.given[self.number.value] = tensor.clone()
        self.barrier.wait(20)
        tensor.copy_(sum(self.given))
        self.barrier.wait(20)


class PlainEngine:
    """What a step asks of ZeRO-3, on one rank: gradients add up in the module."""

    device = torch.device("cpu")

    def __init__(self, module, rank, world_size):
        self.engine = self
        self.module, self.rank, self.world_size = module, rank, world_size

    def __call__(self, *args):
        return self.module(*args)

    def backward(self, loss, last):
        loss.backward()

    def step(self, lr):
        return 0.0


def gradients_of_a_step(cola, monkeypatch, ranks, micro_batch_size, seed=0):
    """Of a step of the stage actions on eight rows, over all ranks."""
    draw = np.random.default_rng(0)
    mask = draw.random((8, 12)) < 0.7
    places = np.tile(np.arange(12), (8, 1))
    rows = PackedRows(draw.integers(3, VOCAB_SIZE, (8, 12)), places, mask)
    changed = override(preset("tiny"), {
        "pretrain.batch_size": 8, "pretrain.micro_batch_size": micro_batch_size, "pretrain.balance_coef": 5.0,
        "model.num_actions": NUM_ACTIONS, "seed": seed,
    })  # fmt: skip
    group, found = Ranks(ranks), [None] * ranks
    monkeypatch.setattr(torch.distributed, "all_reduce", group.all_reduce)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)

    def run(rank):
        group.number.value = rank
        module = stage_module("actions", cola, balance_coef=5.0)
        metrics, _ = corpus_step(changed, PlainEngine(module, rank, ranks), rows, "actions", 3, 0.1)
        found[rank] = metrics, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found[0][0], {name: sum(of[name] for _, of in found) for name in found[0][1]}


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(1, 1), (1, 3), (2, 4), (2, 1)])
def test_a_steps_gradient_does_not_depend_on_how_its_rows_are_dealt(cola, monkeypatch, ranks, micro_batch_size):
    """Nor do its metrics: with a weight on even usage, which is that of all rows. float32 sums of 60 rows: 1e-5."""
    metrics, wanted = gradients_of_a_step(cola, monkeypatch, 1, 8)
    other, found = gradients_of_a_step(cola, monkeypatch, ranks, micro_batch_size)
    assert other == pytest.approx(metrics, rel=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("seed", [1, 127, 128, 256, 2**31 - 1])
def test_any_seed_draws_noise_of_its_own(seed):
    rows = np.array([0, 1, 2**31])
    steps = [noise_seeds(seed, step, rows) for step in (0, 1, 300_000)] + [noise_seeds(seed - 1, 0, rows)]
    assert len(torch.cat(steps).unique()) == 12
    assert torch.cat(steps).min() >= 0
    assert torch.equal(steps[1], noise_seeds(seed, 1, rows))


@pytest.mark.parametrize("seed", [-1, 2**31, 0.5, "one"])
def test_what_is_no_seed_is_refused(seed):
    for field in ("seed", "sweep.seeds"):
        with pytest.raises(ConfigError, match=f"^{field} = "):
            override(preset("tiny"), {field: seed if field == "seed" else (seed,)})


def test_stages_that_are_not_named_keep_their_steps():
    tiny, agents = preset("tiny").pretrain, preset("tiny", agents=True).pretrain
    assert agents.steps == tiny.steps | {"base": 500, "actions": 500, "policy": 150}
    assert preset("smollm2-135m", agents=True).pretrain.steps == PretrainConfig().steps
    assert PretrainConfig(steps={"policy": 7}).steps == PretrainConfig().steps | {"policy": 7}
    for changes in ({"pretrain.steps": {"q": 7}}, {"pretrain.steps.q": 7}):
        assert override(preset("tiny"), changes).pretrain.steps == tiny.steps | {"q": 7}


def test_actions_loss_starts_at_the_bases(base_dir, packed):
    model = CoLAForCausalLM.attach(base_dir, num_actions=NUM_ACTIONS, num_idm_layers=1, num_policy_layers=1)
    _, sums = stage_module("actions", model)(*packed)
    assert float(sums["loss"]) == pytest.approx(float(sums["base_loss"]), rel=1e-6)


def test_teacher_forced_accuracy_is_greedy_accuracy(cola):
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, VOCAB_SIZE, (6, 5), generator=generator)
    answers, _, _ = cola.generate_latent(prompts, max_new_tokens=4, temperature=0.0)
    answers[3, 2] = (answers[3, 2] + 1) % VOCAB_SIZE  # one answer is not what greedy decoding gives
    ids = torch.cat([prompts, answers], 1)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    mask[:, 4:8] = True
    module = stage_module("policy", cola)
    assert module.correct(ids, torch.ones_like(ids), mask).tolist() == [True, True, True, False, True, True]


class Quiet:
    """A report that nobody reads."""

    def __call__(self, metrics, saved=False):
        return False

    def doing(self, what):
        pass

    def say(self, line):
        raise AssertionError(line)

    fail = say


@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
def test_the_stage_base_trains_a_given_base_by_itself(kind, tokenizer, tmp_path, one_rank):
    base = random_base(kind, {"vocab_size": 280, "head_dim": 48, "tie_word_embeddings": True})
    for saved in (base, tokenizer):
        saved.save_pretrained(tmp_path / "base")
    config = override(preset("tiny"), {
        "model.base": str(tmp_path / "base"), "output_dir": str(tmp_path / "run"), "pretrain.max_steps": 1,
        "pretrain.stages": ("base", "actions"), "pretrain.batch_size": 4, "pretrain.micro_batch_size": 4,
        "task.num_problems": 60, "pretrain.warmup_steps": 0, "cluster.learner_ranks": 1,
    })  # fmt: skip
    train_loop(config, Quiet())
    stages = tmp_path / "run" / "stages"
    start, trained = (AutoModelForCausalLM.from_pretrained(stages / name) for name in ("start", "base"))
    assert type(start) is type(trained) is type(base)
    made = CoLAForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert made.config.base_model_type == kind
    for name, tensor in base.state_dict().items():
        assert torch.equal(start.state_dict()[name], tensor), name
        assert not torch.equal(trained.state_dict()[name], tensor), f"{name}: all of the base trains"
        assert torch.equal(made.state_dict()[name], trained.state_dict()[name]), name


def test_the_bare_bases_loss_is_computed_where_it_is_measured_alone(cola, packed):
    """Its matrix product is as large as the loss's own; what trains comes out the same without it."""
    asked, module = [], StageModule(cola, "actions", preset("tiny"))
    module.head_loss.register_forward_hook(lambda _, given, __: asked.append(len(given[0])))
    of = {measure: module(*packed[:4], measure) for measure in (False, True)}
    states = int(packed[2][:, :-1].sum())
    assert "base_loss" in of[True][1]
    assert "base_loss" not in of[False][1]
    assert torch.equal(of[True][0], of[False][0])
    assert asked == [states, states, states], "the world model's in both, and the base's in one"
