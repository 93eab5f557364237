"""Families of bases: each must behave like Llama, in small random models in float32.

    attach equals the base, bit for bit    engine = generate_latent = the learner        an update reaches the engine
    the same over tokens, whole or LoRA    a checkpoint opens without the package        vLLM serves it by itself
                                           a reward model is made of it

Each family has its own engines; most of the time goes into starting them.
"""

import copy
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    BASES,
    GIVEN,
    NUM_ACTIONS,
    VOCAB_SIZE,
    assert_near,
    drawn_shape,
    random_base,
    scramble,
    small_base,
    words,
)
from engines import ON_ACCELERATOR
from transformers import AutoModelForCausalLM

from cola_ray import CoLAForCausalLM, registry
from cola_ray.learner.policies import LatentPolicy, TokenPolicy
from cola_ray.learner.reward_model import PairedRewards, open_classifier
from cola_ray.model.conversion import plain_base
from cola_ray.model.modeling_cola import sample_actions
from cola_ray.rollout.engine import LatentEngine, Request, TokenEngine
from cola_ray.settings.config import override
from cola_ray.settings.presets import preset
from cola_ray.weights import WeightSender, WeightTransferError

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
STOP = 7
LOG_PROB_TOLERANCE = 1e-4
STATE_TOLERANCE = 2e-5
SIZES = {"num_actions": NUM_ACTIONS, "num_idm_layers": 1, "num_world_model_layers": 2, "num_policy_layers": 2}
ENGINE = {
    "dtype": "float32", "max_model_len": 160, "stop_token_ids": [STOP], "max_num_seqs": 16, "block_size": 32,
    "num_gpu_blocks_override": 32, "max_num_batched_tokens": 160, **ON_ACCELERATOR,
}  # fmt: skip


@pytest.fixture(scope="module", params=BASES)
def base(request):
    return small_base(request.param)


@pytest.fixture(scope="module")
def base_dir(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    base.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sizes(base, tmp_path_factory):
    """Sizes of CoLA's modules; for a family that is not built in, also the family as in docs/extending.md."""
    kind = base.config.model_type
    if kind in registry.BUILT_IN["base"]:
        return SIZES
    if kind in GIVEN:
        return SIZES | {"family": GIVEN[kind]}
    (example,) = re.findall(rf"```python file={kind}.py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    path = tmp_path_factory.mktemp("outside") / f"{kind}.py"
    path.write_text(example)
    return SIZES | {"family": f"{path}:{kind.upper()}"}


@pytest.fixture(scope="module")
def cola(base_dir, sizes):
    return around(base_dir, sizes)


def around(base_dir, sizes):
    """CoLA around a base: the base keeps its weights, all others are random and have an effect."""
    model = scramble(CoLAForCausalLM.attach(base_dir, **sizes), keep=("model.", "lm_head."))
    generator = torch.Generator().manual_seed(2)
    for parameter in model.policy.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def cola_dir(cola, tmp_path_factory):
    path = tmp_path_factory.mktemp("cola")
    cola.save_pretrained(path)
    words().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine(cola_dir):
    engine = LatentEngine(str(cola_dir), keep_hidden_states=True, **ENGINE)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def token_engine(base_dir):
    engine = TokenEngine(str(base_dir), **ENGINE)
    yield engine
    engine.close()


def requests():
    """16 requests of mixed length and settings, most of them longer than an attention window."""
    draw = np.random.default_rng(3)
    shared = draw.integers(8, VOCAB_SIZE, 40).tolist()
    return [
        Request(
            prompt_ids=(shared if i % 4 == 0 else []) + draw.integers(8, VOCAB_SIZE, 1 + (i * 13) % 60).tolist(),
            seed=1000 + i,
            temperature=[1.0, 0.0, 0.7, 1.3][i % 4],
            top_k=[0, 0, 3, 9][(i // 4) % 4],
            top_p=[1.0, 0.8, 1.0][i % 3],
            max_new_tokens=6 + (i * 37) % 14,
        )
        for i in range(16)
    ]


def ids_of(*shape):
    return torch.randint(8, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(4))


def test_attach_is_the_base_bit_for_bit(base, base_dir, sizes):
    model, ids = CoLAForCausalLM.attach(base_dir, **sizes).eval(), ids_of(2, 40)
    wanted = base(ids).logits
    assert torch.equal(model(ids).logits, wanted)
    assert torch.equal(model(ids, actions=ids % NUM_ACTIONS).logits, wanted)
    kinds = {type(layer) for stack in (model.model, model.policy, model.idm) for layer in stack.layers}
    assert kinds == {type(base.model.layers[0])}, "a policy has the layers of its base"


def test_the_base_comes_out_of_a_checkpoint_as_it_went_in(base, cola_dir, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(plain_base(cola_dir, tmp_path / "plain"))
    ids = ids_of(2, 20)
    assert type(plain) is type(base)
    assert torch.equal(plain(ids).logits, base(ids).logits)
    assert plain.config.to_diff_dict().keys() == base.config.to_diff_dict().keys()


def reference(model, request):
    columns = model.generate_latent(
        torch.tensor([request.prompt_ids]), max_new_tokens=request.max_new_tokens, temperature=request.temperature,
        top_k=request.top_k, top_p=request.top_p, seed=request.seed, eos_token_id=STOP,
    )  # fmt: skip
    return [column[0].numpy() for column in columns]


def assert_same(completion, expected):
    tokens, actions, log_probs = expected
    assert completion.token_ids.tolist() == list(tokens)
    assert completion.actions.tolist() == list(actions)
    np.testing.assert_allclose(completion.log_probs, log_probs, atol=LOG_PROB_TOLERANCE)


def test_engine_learner_and_generate_agree(engine, cola):
    assert_all_agree(engine, cola)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("kind", registry.BUILT_IN["base"])
def test_they_agree_on_drawn_shapes(kind, number, tmp_path):
    shape = drawn_shape(kind, random.Random(f"{kind} {number}"), heads=(32, 64, 80))
    random_base(kind, shape).save_pretrained(tmp_path / "base")
    cola = around(tmp_path / "base", SIZES)
    cola.save_pretrained(tmp_path / "cola")
    words().save_pretrained(tmp_path / "cola")
    engine = LatentEngine(str(tmp_path / "cola"), keep_hidden_states=True, **ENGINE)
    try:
        assert_all_agree(engine, cola)
    finally:
        engine.close()


def assert_all_agree(engine, cola):
    """Check that engine, learner and ``generate_latent`` agree on actions, log-probabilities and states."""
    asked = requests()
    made = engine.generate(asked)
    learner = LatentPolicy(copy.deepcopy(cola)).eval()
    for request, completion in zip(asked, made, strict=True):
        assert_same(completion, reference(cola, request))
        ids = torch.tensor([[*request.prompt_ids, *completion.token_ids.tolist()]])
        scored = torch.zeros_like(ids, dtype=torch.bool)
        scored[0, len(request.prompt_ids) - 1 : -1] = True
        logits, states, _, _ = learner(ids, torch.ones_like(ids), scored)
        _, log_probs = sample_actions(
            logits, *(torch.full((len(logits),), one) for one in (request.temperature, request.top_k)),
            torch.zeros(len(logits), dtype=torch.int64), torch.arange(len(logits)),
            torch.from_numpy(completion.actions), torch.full((len(logits),), request.top_p),
        )  # fmt: skip
        np.testing.assert_allclose(completion.log_probs, log_probs.detach(), atol=LOG_PROB_TOLERANCE)
        np.testing.assert_allclose(completion.hidden_states, states[0, :-1], atol=STATE_TOLERANCE, rtol=STATE_TOLERANCE)


def changed(model):
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(9)
    for parameter in other.parameters():
        parameter.data += 0.1 * parameter.data.std().nan_to_num(1.0) * torch.randn(parameter.shape, generator=generator)
    return other


def publish(engine, version, policy):
    named = [(one.name, one.merged(*(p.detach() for p in one.parameters))) for one in policy.published()]
    engine.update_weights(version, list(WeightSender(1 << 12).buckets(version, named)))


def test_an_update_reaches_the_engine(engine, cola):
    request, other = requests()[8], copy.deepcopy(cola)
    other.policy = changed(cola.policy)
    publish(engine, 1, LatentPolicy(copy.deepcopy(other)))
    assert_same(engine.generate([request])[0], reference(other, request))
    incomplete = LatentPolicy(copy.deepcopy(other))
    first = incomplete.published()[0].name
    incomplete.published = lambda: LatentPolicy.published(incomplete)[1:]
    with pytest.raises(WeightTransferError, match=first):
        publish(engine, 2, incomplete)
    publish(engine, 3, LatentPolicy(copy.deepcopy(cola)))
    assert_same(engine.generate([request])[0], reference(cola, request))


@torch.no_grad()
def token_reference(model, request):
    ids, log_probs = list(request.prompt_ids), []
    for _ in range(request.max_new_tokens):
        whole = [torch.tensor([value]) for value in (request.top_k, request.seed, len(ids) - 1)]
        logits = model(torch.tensor([ids])).logits[:, -1]
        heat, share = torch.tensor([request.temperature]), torch.tensor([request.top_p])
        token, log_prob = sample_actions(logits, heat, *whole, None, share)
        ids.append(int(token))
        log_probs.append(float(log_prob))
        if ids[-1] == STOP:
            break
    made = ids[len(request.prompt_ids) :]
    return made, made, log_probs


def test_tokens_as_actions(token_engine, base):
    asked = requests()[::2]
    made = token_engine.generate(asked)
    assert min(log_prob for completion in made for log_prob in completion.log_probs) < -1, "nothing is drawn"
    for request, completion in zip(asked, made, strict=True):
        assert_same(completion, token_reference(base, request))
    other = changed(base)
    publish(token_engine, 1, TokenPolicy(other))
    assert_same(token_engine.generate(asked[:1])[0], token_reference(other, asked[0]))
    publish(token_engine, 2, TokenPolicy(base))


def test_adapters_arrive_merged(token_engine, base, monkeypatch):
    request, policy = requests()[8], TokenPolicy(copy.deepcopy(base), lora_rank=4)
    for name, parameter in policy.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    monkeypatch.setattr(token_engine, "adapters", True)
    publish(token_engine, 4, policy)
    expected = token_reference(policy.policy, request)
    assert expected[0] != token_reference(base, request)[0]
    assert_same(token_engine.generate([request])[0], expected)
    monkeypatch.setattr(token_engine, "adapters", False)
    publish(token_engine, 5, TokenPolicy(base))
    assert_same(token_engine.generate([request])[0], token_reference(base, request))


def test_a_reward_model_is_made_of_it(base, base_dir):
    config = override(preset("tiny"), {"model.dtype": "float32"})
    classifier = open_classifier(base_dir, words(), config, whole=True).eval()
    ids = ids_of(4, 20)
    rewards = PairedRewards(classifier)(ids, torch.ones_like(ids))
    wanted = classifier.score(base.model(ids).last_hidden_state[:, -1])
    assert_near(rewards.flatten(), wanted[:, 0])
    assert len({round(reward, 4) for reward in rewards.flatten().tolist()}) == 4


ALONE = """
import importlib.abc, json, sys
class Refused(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name.split(".")[0] == "cola_ray":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refused())
import torch
from transformers import AutoModelForCausalLM
for line in sys.stdin:
    folder, prompt = json.loads(line)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    found = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
    print(json.dumps(found[0].tolist()), flush=True)
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A process that cannot import this package."""
    with subprocess.Popen(
        [sys.executable, "-c", ALONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=tmp_path_factory.mktemp("elsewhere"),
    ) as process:  # fmt: skip
        yield process
        process.stdin.close()


def test_a_checkpoint_opens_without_the_package(cola, cola_dir, elsewhere):
    prompt = requests()[5].prompt_ids
    print(json.dumps([str(cola_dir), prompt]), file=elsewhere.stdin, flush=True)
    made = json.loads(elsewhere.stdout.readline())
    assert made == cola.generate(torch.tensor([prompt]), max_new_tokens=8)[0].tolist()


def test_vllm_serves_it_by_itself(cola, cola_dir):
    """The model as ``vllm serve`` loads it, without HTTP: greedy answers equal those of ``generate``."""
    import vllm

    llm = vllm.LLM(
        str(cola_dir), skip_tokenizer_init=True, dtype="float32", max_model_len=160, enforce_eager=True, max_num_seqs=8,
        kv_cache_memory_bytes=16 << 20, block_size=32,
    )  # fmt: skip
    try:
        asked = [request.prompt_ids for request in requests()[:4]]
        params = vllm.SamplingParams(temperature=0.0, max_tokens=8, detokenize=False)
        made = llm.generate([{"prompt_token_ids": row} for row in asked], params, use_tqdm=False)
        for row, found in zip(asked, made, strict=True):
            wanted = cola.generate(torch.tensor([row]), max_new_tokens=8)[0, len(row) :].tolist()
            assert found.outputs[0].token_ids == wanted
    finally:
        llm.llm_engine.engine_core.shutdown()
