"""CoLA as transformers' users know a causal language model: generate, labels, caches, folders that open anywhere.

transformers 5.19 has ``ModelTesterMixin`` in its source distribution, without ``GenerationTesterMixin``. Run on
CoLAForCausalLM the former passes but for its claim that the latter tests every generative model. Not applicable are a
gradient from ``labels`` in each weight (the inverse dynamics model labels actions and has no part in the likelihood of
a text) and, on a CPU, tests of accelerators, tensor parallelism and flash attention. The promises of both stand here as
tests of our own; beam search and assisted generation are refused, and so not tested.
"""

import copy
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import NUM_ACTIONS, VOCAB_SIZE, scramble, small_llama, words
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

from cola_ray import CoLAForCausalLM
from cola_ray.model import conversion, modeling_cola
from cola_ray.model.modeling_cola import action_log_probs, is_released

EOS, NEW = 2, 8


def prompts(count, seed=0):
    """Rows of 1 to 9 tokens, none of them special."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (1 + i % 9,), generator=draw) for i in range(count)]


def left_padded(rows):
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def tokenizer():
    return words(padding_side="left")


@pytest.fixture(scope="module")
def folder(cola, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    cola.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def greedy(cola):
    """Of 150 prompts: what ``generate_latent`` says greedily, up to the end token."""
    rows = prompts(150)
    tokens, actions, _ = cola.generate_latent(
        **left_padded(rows), max_new_tokens=NEW, temperature=0.0, eos_token_id=EOS
    )
    return rows, tokens, actions


def until_end(tokens):
    tokens = tokens.tolist()
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


# --- generate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4, "use_cache": True}],
    ids=["cache", "no cache", "static cache", "chunked prefill"],
)
def test_greedy_generation_is_that_of_generate_latent(cola, greedy, options):
    rows, tokens, _ = greedy
    inputs = left_padded(rows)
    made = cola.generate(**inputs, max_new_tokens=NEW, **options)[:, inputs["input_ids"].shape[1] :]
    assert [until_end(row) for row in made] == [until_end(row) for row in tokens]


def test_a_row_of_a_padded_batch_is_what_it_is_alone(cola, greedy):
    rows, tokens, _ = greedy
    for i in range(0, 150, 10):
        alone = cola.generate(rows[i][None], max_new_tokens=NEW)[0, len(rows[i]) :]
        assert until_end(alone) == until_end(tokens[i])


def test_outputs_bring_the_actions_along(cola, greedy):
    rows, _, actions = greedy
    inputs = left_padded(rows)
    width = inputs["input_ids"].shape[1]
    made = cola.generate(
        **inputs, max_new_tokens=NEW, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    assert torch.equal(made.actions, actions)
    assert len(made.past_key_values) == cola.config.num_hidden_layers + cola.config.num_policy_layers
    for step, logits in enumerate(made.logits):
        going = made.actions[:, step] >= 0
        assert torch.equal(logits.argmax(-1)[going], made.sequences[going, width + step])
    again = cola.generate(
        **inputs, generation_config=GenerationConfig(max_new_tokens=NEW, eos_token_id=EOS, pad_token_id=0)
    )
    assert torch.equal(again, made.sequences)


def test_sampling_draws_an_action_and_takes_its_token(cola):
    """One step, 8 000 draws: each action by its probability, each token by the sum over its actions."""
    row, count, shape = prompts(9)[8], 8000, {"temperature": 1.3, "top_k": 5}
    with torch.no_grad():
        e = cola.encode(row[None])[:, -1]
        log_probs = action_log_probs(
            cola.policy_logits(cola.encode(row[None]))[:, -1], torch.tensor([1.3]), torch.tensor([5])
        )[0]
        said = cola.world_model_logits(e.expand(NUM_ACTIONS, -1), torch.arange(NUM_ACTIONS)).argmax(-1)
    torch.manual_seed(0)
    made = cola.generate(
        row[None], max_new_tokens=1, do_sample=True, num_return_sequences=count, return_dict_in_generate=True, **shape
    )
    actions, tokens = made.actions[:, 0], made.sequences[:, -1]
    assert torch.equal(tokens, said[actions])
    torch.testing.assert_close(made.action_log_probs[:, 0], log_probs[actions], atol=1e-5, rtol=0)
    expected = torch.zeros(VOCAB_SIZE).index_add_(0, said, log_probs.exp())
    found = torch.bincount(tokens, minlength=VOCAB_SIZE) / count
    # Five standard deviations of a binomial share.
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all()
    assert len(actions.unique()) == 5


def test_all_actions_are_drawn_from_unless_top_k_says_otherwise(base_dir):
    """transformers' own default keeps the 50 best of a vocabulary; here that would cut a codebook."""
    model = CoLAForCausalLM.attach(base_dir, num_actions=64, num_idm_layers=1, num_policy_layers=1)
    model.policy.head.weight.data.zero_()
    made = model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=True, return_dict_in_generate=True)
    torch.testing.assert_close(made.action_log_probs, torch.full((1, 4), 1 / 64).log())
    made = model.generate(
        torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=True, return_dict_in_generate=True,
        generation_config=GenerationConfig(top_k=50),
    )  # fmt: skip
    assert made.actions.max() < 64


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        ({"top_p": 0.6}, lambda p: p.cumsum(0) - p < 0.6),
        ({"min_p": 0.2}, lambda p: p >= 0.2 * p[0]),
        ({"epsilon_cutoff": 0.05}, lambda p: p >= 0.05),
    ],
)
def test_truncations_are_of_the_policy(cola, shape, kept):
    row = prompts(9)[7]
    with torch.no_grad():
        probs = cola.policy_logits(cola.encode(row[None]))[0, -1].softmax(-1)
    ordered, order = probs.sort(descending=True)
    allowed = order[kept(ordered)]
    expected = torch.zeros_like(probs).scatter(0, allowed, probs[allowed])
    torch.manual_seed(1)
    made = cola.generate(
        row[None], max_new_tokens=1, do_sample=True, num_return_sequences=500, return_dict_in_generate=True, **shape
    )
    assert set(made.actions.flatten().tolist()) <= set(allowed.tolist())
    scored = (expected / expected.sum()).log()[made.actions[:, 0]]
    torch.testing.assert_close(made.action_log_probs[:, 0], scored, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2}, "beam search: beams are ranked"),
        ({"num_beams": 2, "do_sample": True}, "beam sample: beams are ranked"),
        ({"prompt_lookup_num_tokens": 2}, "assisted generation: drafts are accepted"),
        ({"penalty_alpha": 0.6}, "penalty_alpha: it ranks tokens"),
        ({"dola_layers": "high"}, "dola generation: it contrasts"),
        ({"guidance_scale": 2.0}, "guidance_scale: it mixes"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"cache_implementation": "paged"}, "continuous batching: it samples tokens itself"),
    ],
)
def test_what_has_no_meaning_over_actions_is_refused(cola, options, words):
    with pytest.raises(ValueError, match=words):
        cola.generate(torch.tensor([[5, 6]]), max_new_tokens=2, **options)
    with pytest.raises(ValueError, match="assisted generation: drafts"):
        cola.generate(torch.tensor([[5, 6]]), max_new_tokens=2, assistant_model=small_llama())


def test_what_acts_on_tokens_acts_given_the_action(cola, greedy):
    rows, tokens, _ = greedy
    first = int(tokens[0, 0])
    free = cola.generate(rows[0][None], max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
    second = int(free.logits[0][0].topk(2).indices[1])
    for options in ({"suppress_tokens": [first]}, {"bad_words_ids": [[first]]}):
        assert int(cola.generate(rows[0][None], max_new_tokens=1, **options)[0, -1]) == second
    for options in ({}, {"do_sample": True}):
        made = cola.generate(rows[0][None], max_new_tokens=NEW, no_repeat_ngram_size=1, **options)[0].tolist()
        assert len(set(made)) == len(made)


def test_embeddings_stand_for_their_tokens(cola, greedy):
    rows, tokens, _ = greedy
    embedded = cola.get_input_embeddings()(rows[8][None])
    assert until_end(cola.generate(inputs_embeds=embedded, max_new_tokens=NEW)[0]) == until_end(tokens[8])
    torch.testing.assert_close(cola(inputs_embeds=embedded).logits, cola(rows[8][None]).logits)


def test_streams_and_stopping_criteria(cola, greedy, tokenizer):
    rows, tokens, _ = greedy
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    cola.generate(rows[3][None], max_new_tokens=NEW, streamer=streamer)
    assert "".join(streamer).split() == tokenizer.decode(until_end(tokens[3])).split()
    two = StoppingCriteriaList([lambda ids, _: torch.full((len(ids),), ids.shape[1] >= len(rows[3]) + 2)])
    assert cola.generate(rows[3][None], max_new_tokens=NEW, stopping_criteria=two).shape[1] == len(rows[3]) + 2


@pytest.mark.parametrize("eos", [EOS, None])
def test_rows_that_a_criterion_ended_have_no_more_actions(cola, eos):
    """Every other row, at three tokens; the other ones go on, and their actions are those of generate_latent."""
    inputs = left_padded(prompts(8))
    width = inputs["input_ids"].shape[1]
    every_other = torch.arange(8) % 2 == 0
    criteria = StoppingCriteriaList([lambda ids, _: every_other & (ids.shape[1] >= width + 3)])
    _, actions, log_probs = cola.generate_latent(
        **inputs, max_new_tokens=NEW, temperature=0.0, eos_token_id=eos, stopping_criteria=criteria
    )
    settings = GenerationConfig(max_new_tokens=NEW, eos_token_id=eos, pad_token_id=0, return_dict_in_generate=True)
    made = cola.generate(**inputs, generation_config=settings, stopping_criteria=criteria)
    assert (made.actions[every_other, 3:] == -1).all()
    assert torch.equal(made.actions, actions)
    torch.testing.assert_close(made.action_log_probs, log_probs)


def test_actions_are_forced_in_forward_and_generate_latent_alone(cola):
    ids = torch.tensor([[5, 6, 7]])
    for name in ("actions", "choose_actions"):
        with pytest.raises(ValueError, match=rf"{name}: .* force them with generate_latent"):
            cola.generate(ids, max_new_tokens=2, **{name: torch.zeros(1, 2, dtype=torch.int64)})
    for kept, width in ((0, 1), (0, 4), (1, 3)):
        with pytest.raises(ValueError, match="one action for each"):
            cola(ids, logits_to_keep=kept, actions=torch.zeros(1, width, dtype=torch.int64))


def test_a_pipeline_is_greedy_unless_told_otherwise(cola, greedy, tokenizer):
    rows, tokens, _ = greedy
    ask = pipeline("text-generation", model=cola, tokenizer=tokenizer, batch_size=8)
    texts = [tokenizer.decode(row) for row in rows[:24]]
    said = [found[0]["generated_text"] for found in ask(texts, max_new_tokens=NEW, return_full_text=False)]
    expected = [tokenizer.decode(row, skip_special_tokens=True) for row in tokens[:24]]
    assert [one.split() for one in said] == [one.split() for one in expected]
    torch.manual_seed(0)
    drawn = ask(texts[:1] * 40, do_sample=True, temperature=2.0, max_new_tokens=3, return_full_text=False)
    assert len({found[0]["generated_text"] for found in drawn}) > 5


# --- forward ------------------------------------------------------------------------------------------------------


def test_a_cache_holds_base_and_policy(cola):
    cola = copy.deepcopy(cola).double()
    ids = torch.stack([row[:8] for row in prompts(27) if len(row) >= 8])
    whole = cola(ids, use_cache=False)
    for cache in (None, DynamicCache(config=cola.config), DynamicCache()):
        first = cola(ids[:, :5], past_key_values=cache)
        second = cola(ids[:, 5:], past_key_values=first.past_key_values)
        assert len(second.past_key_values) == cola.config.num_hidden_layers + cola.config.num_policy_layers
        assert second.past_key_values.get_seq_length() == 8
        torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole.logits)
    assert whole.past_key_values is None


def test_outputs_of_forward(cola):
    ids = torch.stack([row[:8] for row in prompts(27) if len(row) >= 8])
    out = cola(ids, output_hidden_states=True)
    assert torch.equal(out.hidden_states[-1], cola.encode(ids))
    assert torch.equal(cola(ids, logits_to_keep=1).last_hidden_state, cola.encode(ids))
    assert len(out.hidden_states) == cola.config.num_hidden_layers + 1
    assert torch.equal(out.action_logits, cola.policy_logits(cola.encode(ids)))
    assert torch.equal(out.actions, out.action_logits.argmax(-1))
    for kept in (1, 3, torch.tensor([2, 5])):
        part = cola(ids, logits_to_keep=kept)
        where = kept if isinstance(kept, torch.Tensor) else slice(-kept, None)
        torch.testing.assert_close(part.logits, out.logits[:, where], atol=1e-5, rtol=1e-5)
    wanted = torch.where(torch.arange(8) % 2 == 0, 3, -1).expand(len(ids), -1)
    steered = cola(ids, actions=wanted)
    assert torch.equal(steered.actions, torch.where(wanted < 0, out.actions, wanted))
    torch.testing.assert_close(steered.logits, cola.world_model_logits(out.hidden_states[-1], steered.actions))
    as_tuple = cola(ids, use_cache=False, return_dict=False)
    assert torch.equal(as_tuple[0], out.logits)


def test_labels_score_texts_by_sums_over_actions(cola, monkeypatch):
    """``-log sum_a pi(a | e) p(x | e, a)``, by enumeration in float64, whatever is held at a time."""
    model = copy.deepcopy(cola).double()
    inputs = left_padded(prompts(9, seed=3)[4:])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[1, -2:] = -100
    with torch.no_grad():
        e = model.encode(**inputs)
        policy = model.policy_logits(e, inputs["attention_mask"]).double().softmax(-1)
        each = torch.stack([model.world_model_logits(e, torch.full(labels.shape, a)) for a in range(NUM_ACTIONS)], -2)
        probs = (policy[..., None] * each.float().double().softmax(-1)).sum(-2)
    wanted, terms = labels[:, 1:], []
    for i, t in (wanted != -100).nonzero().tolist():
        terms.append(-probs[i, t, wanted[i, t]].log())
    expected = torch.stack(terms)
    reference = None
    for at_once in (1, 1 << 25):
        monkeypatch.setattr(modeling_cola, "_LOGITS_AT_ONCE", at_once)
        model.zero_grad()
        loss = model(**inputs, labels=labels).loss
        # float32 log-probabilities of a hundred columns, down to some -20
        torch.testing.assert_close(loss.double(), expected.mean(), atol=1e-5, rtol=1e-5)
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        silent = {name for name, gradient in gradients.items() if gradient is None}
        assert silent == {name for name, _ in model.named_parameters() if name.startswith("idm.")}
        if reference is not None:
            for name in gradients.keys() - silent:
                torch.testing.assert_close(gradients[name], reference[name], atol=1e-5, rtol=1e-4)
        reference = gradients
    told = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(told.double(), expected.sum() / 7, atol=1e-5, rtol=1e-5)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(model(**inputs, labels=labels, shift_labels=shifted).loss, loss)
    assert model(**inputs, labels=torch.full_like(labels, -100)).loss == 0


def test_gradient_checkpointing_changes_no_gradient(cola):
    ids = torch.stack([row[:8] for row in prompts(27) if len(row) >= 8])
    found = []
    for checkpointing in (False, True):
        model = copy.deepcopy(cola).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.policy.layers[0].gradient_checkpointing
        model(ids, labels=ids).loss.backward()
        found.append([p.grad for name, p in model.named_parameters() if not name.startswith("idm.")])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("size", [VOCAB_SIZE + 8, VOCAB_SIZE - 6])
def test_the_vocabulary_can_be_resized(cola, size):
    model = copy.deepcopy(cola)
    model.resize_token_embeddings(size, mean_resizing=False)
    ids = torch.tensor([[5, 6, 7]])
    common = min(size, VOCAB_SIZE)
    assert model(ids).logits.shape[-1] == size == model.config.vocab_size
    torch.testing.assert_close(model(ids).logits[..., :common], cola(ids).logits[..., :common])
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_copies_types_and_kernels(cola, folder):
    ids = torch.stack([row[:8] for row in prompts(27) if len(row) >= 8])
    expected = cola(ids).logits
    fresh = CoLAForCausalLM.from_pretrained(folder)
    for other in (copy.deepcopy(cola), pickle.loads(pickle.dumps(fresh))):
        assert torch.equal(other(ids).logits, expected)
    buffer = io.BytesIO()
    torch.save(cola.state_dict(), buffer)
    buffer.seek(0)
    again = CoLAForCausalLM(copy.deepcopy(cola.config)).eval()
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(again(ids).logits, expected)
    assert copy.deepcopy(cola).to(torch.bfloat16).generate(ids, max_new_tokens=2).shape == (len(ids), 10)
    assert copy.deepcopy(cola).half()(ids).logits.dtype is torch.float16
    eager = CoLAForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert eager.policy.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(ids).logits, expected, atol=1e-4, rtol=1e-4)
    attended = eager(ids, output_attentions=True).attentions
    assert [one.shape for one in attended] == [(len(ids), 2, 8, 8)] * cola.config.num_hidden_layers


# --- folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": "auto"}, {"dtype": "auto"}])
def test_folders_open_as_any_models(cola, folder, options):
    for auto in (AutoModel, AutoModelForCausalLM):
        model = auto.from_pretrained(folder, **options)
        assert isinstance(model, CoLAForCausalLM)
        assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, cola(torch.tensor([[5, 6, 7]])).logits)
    assert AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).dtype is torch.bfloat16
    assert AutoConfig.from_pretrained(folder).num_actions == NUM_ACTIONS
    assert len(AutoTokenizer.from_pretrained(folder)) == VOCAB_SIZE


ELSEWHERE = """
import importlib.abc, json, sys, torch

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "cola_ray":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, again, rows = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
said = [model.generate(torch.tensor([row]), max_new_tokens=8)[0].tolist() for row in rows]
model.save_pretrained(again)
ask = pipeline("text-generation", again, tokenizer=tokenizer, trust_remote_code=True)
text = ask("w5 w6", max_new_tokens=8, return_full_text=False)[0]["generated_text"]
tokens, actions, _ = model.generate_latent(torch.tensor(rows[-1:]), max_new_tokens=8, seed=3)
print(json.dumps([said, text, tokens.tolist(), actions.tolist(), type(model).__module__.split(".")[0]]))
"""


@pytest.mark.timeout(300)
def test_a_folder_answers_where_the_package_is_not_installed(cola, folder, tokenizer, tmp_path):
    rows = [row.tolist() for row in prompts(9, seed=7)]
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(folder), str(tmp_path / "again"), json.dumps(rows)],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    said, text, tokens, actions, module = json.loads(run.stdout.splitlines()[-1])
    assert module == "transformers_modules"
    assert said == [cola.generate(torch.tensor([row]), max_new_tokens=8)[0].tolist() for row in rows]
    here = cola.generate(**tokenizer("w5 w6", return_tensors="pt", return_token_type_ids=False), max_new_tokens=8)
    assert text.split() == tokenizer.decode(here[0, 2:], skip_special_tokens=True).split()
    expected = cola.generate_latent(torch.tensor(rows[-1:]), max_new_tokens=8, seed=3)
    assert (tokens, actions) == (expected[0].tolist(), expected[1].tolist())
    assert (tmp_path / "again" / "modeling_cola.py").read_text() == Path(modeling_cola.__file__).read_text()


def test_a_folder_says_what_it_holds(base_dir, tmp_path):
    model = CoLAForCausalLM.attach(base_dir, num_actions=4, num_idm_layers=1, num_policy_layers=1)
    model.config.card |= {"data": "arithmetic", "figures": {"accuracy, held out": 0.92}}
    model.save_pretrained(tmp_path / "model")
    names = {file.name for file in (tmp_path / "model").iterdir()}
    assert names >= {"README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_cola.py"}
    again = CoLAForCausalLM.from_pretrained(tmp_path / "model")
    again.save_pretrained(tmp_path / "again")
    card = huggingface_hub.ModelCard.load(tmp_path / "again" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    for said in (f"| base | {base_dir.name} |", "| data | arithmetic |", "| accuracy, held out | 0.92 |", "## Licence"):
        assert said in card.text
    assert str(base_dir.parent) not in card.text, "where it lay on this machine is nobody's business"
    for reward in (0.1, 0.5):
        conversion.describe(tmp_path / "again", {"task": "arithmetic"}, {"reward": reward})
    described = (tmp_path / "again" / "README.md").read_text()
    assert all(
        said in described for said in ("| task | arithmetic |", "| accuracy, held out | 0.92 |", "| reward | 0.5 |")
    )
    assert CoLAForCausalLM.from_pretrained(tmp_path / "again").config.card["task"] == "arithmetic"
    (tmp_path / "again" / "README.md").write_text("# Mine\n")
    conversion.describe(tmp_path / "again", {"task": "other"}, {})
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == "# Mine\n"
    again.config.card["base"] = "meta-llama/Llama-3.1-8B"
    assert "\nbase_model: meta-llama/Llama-3.1-8B\n" in modeling_cola.model_card(again.config)


def test_push_to_hub_takes_all_of_it_along(cola, monkeypatch):
    pushed = {}

    class Hub:
        def create_repo(self, *_, **__):
            return huggingface_hub.RepoUrl("https://huggingface.co/me/mine")

        def create_commit(self, *, operations, **_):
            pushed.update({one.path_in_repo: Path(one.path_or_fileobj).read_bytes() for one in operations})

    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda *_, **__: Hub())
    blank = huggingface_hub.ModelCard("---\n---\nThis model card has been automatically generated.")
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: blank)
    cola.push_to_hub("me/mine")
    assert pushed.keys() >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_cola.py",
    }
    assert b"steered by latent actions" in pushed["README.md"]


def test_the_modelling_file_stands_alone():
    from transformers.dynamic_module_utils import get_imports, get_relative_import_files

    assert set(get_imports(modeling_cola.__file__)) - set(sys.stdlib_module_names) == {
        "huggingface_hub", "safetensors", "torch", "transformers",
    }  # fmt: skip
    assert get_relative_import_files(modeling_cola.__file__) == []


def test_released_folders_need_the_package_in_words(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"architectures": ["IntentionForCausalLM"]}')
    assert is_released(tmp_path)
    monkeypatch.setitem(sys.modules, "cola_ray.model.conversion", None)
    with pytest.raises(ModuleNotFoundError, match="need the package cola_ray"):
        CoLAForCausalLM.from_pretrained(tmp_path)


def test_a_model_trained_with_labels_learns(base_dir):
    model = scramble(CoLAForCausalLM.attach(base_dir, num_actions=4, num_idm_layers=1, num_policy_layers=1)).train()
    ids = torch.stack([row[:8] for row in prompts(27) if len(row) >= 8])
    optimizer = torch.optim.Adam([*model.policy.parameters(), *model.world_model.parameters()], 3e-3)
    losses = []
    for _ in range(20):
        loss = model(ids, labels=ids).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("first", ["cola_ray", "transformers.models.llama.modeling_llama"])
def test_auto_classes_know_the_model_whichever_is_imported_first(folder, first):
    """Into a half loaded transformers nothing of it can be imported; its auto classes know CoLA by name."""
    rest = "import cola_ray, transformers.models.llama.modeling_llama; from transformers import AutoModel, AutoConfig;"
    ask = f"c = AutoConfig.from_pretrained({str(folder)!r}); print(type(AutoModel.from_config(c)).__module__)"
    run = subprocess.run(
        [sys.executable, "-c", f"import {first}; {rest} {ask}"], capture_output=True, text=True, check=False
    )
    assert run.stdout.split()[-1:] == ["cola_ray.model.modeling_cola"], run.stderr[-1000:]
