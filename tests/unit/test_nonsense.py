"""Command lines that make no sense: refused with exit code 2, in one line a mistake, before anything heavy loads."""

import errno
import json
import os
import re
import shlex
import struct
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from cola_ray.checks import machine
from cola_ray.cli.arguments import from_command_line
from cola_ray.model.checkpoints import faults, shape_of
from cola_ray.runs.provenance import PATHS
from cola_ray.settings.config import Config, schemas
from cola_ray.settings.relevance import _READ, reads
from cola_ray.tasks.inspection import generators
from cola_ray.tasks.rows import open_rows, peek, read_rows

HEAVY = ("torch", "transformers", "ray", "vllm", "mlflow", "deepspeed", "reasoning_gym", "matplotlib", "datasets")
LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 2, "vocab_size": 8,
         "max_position_embeddings": 512}  # fmt: skip
COLA = LLAMA | {"model_type": "cola", "num_actions": 16}


def checkpoint(folder, config, tokens=8, rows=8, tokenizer=True):
    """A checkpoint's folder whose weights are a few numbers."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": np.zeros((rows, 4), np.float32), "model.norm.weight": np.zeros(4)}
    save_file(tensors, folder / "model.safetensors")
    if tokenizer:
        vocabulary = {f"t{i}": i for i in range(tokens)}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    return folder


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with good and bad files, named relative to it in the command lines."""
    here = tmp_path_factory.mktemp("here")
    good = {"question": "q", "answer": "#### 1"}
    checkpoint(here / "cola", COLA)
    checkpoint(here / "llama", LLAMA)
    checkpoint(here / "plain", LLAMA | {"architectures": ["LlamaForCausalLM"]})
    checkpoint(here / "sized", COLA | {"num_actions": 16})
    checkpoint(here / "gpt2", LLAMA | {"model_type": "gpt2"})
    checkpoint(here / "mixtral", LLAMA | {"model_type": "mixtral"})
    checkpoint(here / "windowed", LLAMA | {"model_type": "qwen2", "use_sliding_window": True})
    checkpoint(here / "narrow", LLAMA | {"num_attention_heads": 4})
    checkpoint(here / "biased", LLAMA | {"model_type": "qwen3", "attention_bias": True})
    checkpoint(here / "quantised", LLAMA | {"quantization_config": {"quant_method": "awq"}})
    checkpoint(here / "wide", LLAMA, tokens=9)
    checkpoint(here / "torn", LLAMA, rows=6)
    checkpoint(here / "mute", LLAMA, tokenizer=False)
    checkpoint(here / "short", COLA | {"max_position_embeddings": 64})
    weights = checkpoint(here / "cut", LLAMA) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    (checkpoint(here / "cutconfig", LLAMA) / "config.json").write_text('{"model_type": "lla')
    (checkpoint(here / "lost", LLAMA) / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}})
    )
    (here / "empty").mkdir()
    (here / "void.jsonl").touch()
    (here / "q").mkdir()
    save_file({"layers.2.weight": np.zeros((8, 4), np.float32)}, here / "q" / "q.safetensors")
    (here / "broken.gguf").write_bytes(b"GGUF" + bytes(3))
    (here / "data.csv").write_text("a,b\n1,2\n")
    lines(here / "good.jsonl", good, good)
    lines(here / "null.jsonl", good, {"question": "q", "answer": None})
    lines(here / "missing.jsonl", {"question": "q"})
    lines(here / "unparsed.jsonl", good, '{"question": "q", ')
    lines(here / "list.jsonl", "[1, 2]")
    (here / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(good).encode())
    (here / "latin.jsonl").write_bytes(
        json.dumps({"question": "caf", "answer": "x"}).encode().replace(b"caf", b"caf\xe9")
    )
    lines(here / "pairs.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"})
    lines(here / "odd.jsonl", {"prompt": 3})
    lines(here / "lonely.jsonl", {"prompt": "p"})
    for name, wrong in (
        ("gsm", None),
        ("gsmnull", {"question": "q", "answer": None}),
        ("gsmword", {"question": "q", "answer": "#### many"}),
    ):
        lines(here / name / "train.jsonl", good, *([wrong] if wrong else []))
        lines(here / name / "test.jsonl", good)
    lines(here / "maths" / "test.jsonl", {"problem": "p", "solution": "s", "answer": 7})
    lines(here / "half" / "train.jsonl", good)
    lines(here / "math" / "test.jsonl", {"problem": "p", "solution": "s"})
    (here / "own.py").write_text(
        "from cola_ray.tasks.protocol import Problem\n"
        "class Nothing:\n    pass\n"
        "class Arguments:\n    def __init__(self): pass\n"
        "    def problems(self, split): return []\n    demonstrations = score = problems\n"
        "from cola_ray.tasks.verifiable import Arithmetic\n"
        "class Inherits(Arithmetic):\n    def __init__(self, config, seed): super().__init__({}, 9, seed)\n"
        "class ByOf(Arithmetic):\n    def __init__(self): super().__init__({}, 9, 0)\n"
        "    @classmethod\n    def of(cls, config, seed): return cls()\n"
        "class Raises(Arguments):\n    def __init__(self, config, seed): raise KeyError('corpus')\n"
        "class Empty(Arguments):\n    def __init__(self, config, seed): pass\n"
        "class Fields(Empty):\n    def problems(self, split): return [('q', 'a')]\n"
        "class Number(Empty):\n    def problems(self, split): return [Problem(0, 'q', 7)]\n"
        "class Score(Empty):\n    def problems(self, split): return [Problem(0, 'q', 'a')]\n"
        "    def score(self, split, index, response): return None\n"
        "class Plays:\n    max_turns = 3\n    def reset(self, *, seed): return 'hello'\n"
        "    def step(self, said): return 'x'\n"
        "    def get_state(self): return 0\n    def set_state(self, state): pass\n"
        "    def demonstrations(self, count, seed): return []\n"
        "class Turns(Plays):\n    max_turns = 0\n"
        "class HalfPlays:\n"
        "    def step(self, said): return 'x'\n"
        "class Good(Score):\n    def score(self, split, index, response): return 1.0\n"
        "class Game(Plays):\n    def reset(self, *, seed): return 'hello', {}\n"
        "    def step(self, said): return 'x', 0.0, True, False, {}\n"
        "NUMBER = 3\n"
    )  # fmt: skip
    (here / "bad_own.py").write_text("1 / 0\n")
    (here / "exits.py").write_text("raise SystemExit(3)\n")
    return here


REFUSED = """
rl_math --rl.lr -1 | rl.lr = -1: out of range
rl_math --rl.lr nan | rl.lr = nan: not finite
rl_math --rl.lr inf | rl.lr = inf: not finite
rl_math --rl.lr 0 | rl.lr = 0: out of range
rl_math --rl.lr 5 | rl.lr = 5: out of range
rl_math --rl.lr much | rl.lr = 'much': of the wrong kind
rl_math --rl.lr True | rl.lr = True: of the wrong kind
rl_math --rl.lr | rl.lr = '': 0 values given
rl_math --rl.lr 1 2 | rl.lr = 1 2: 2 values given
rl_math --rl.clip-low 2 | rl.clip_low = 2: out of range
rl_math --rl.clip-high -0.1 | rl.clip_high = -0.1: out of range
rl_math --rl.clip-c 0.9 | rl.clip_c = 0.9: a ratio of 1 is no change; use 0 (none) or a number above 1
rl_math --rl.loss gpso | rl.loss = 'gpso': unknown loss; did you mean gspo?
rl_math --rl.loss cispo | rl.loss = 'cispo': ratios are to the policy at the start of a batch
rl_math --rl.loss-agg-mode seq-mean | rl.loss_agg_mode = 'seq-mean': unknown; did you mean
rl_math --rl.scale-rewards std | rl.scale_rewards = 'std': unknown; use one of group, batch, none
rl_agent --rl.anchor-state state | rl.anchor_state = 'state': unknown; use one of observation, transcript
rl_agent --rl.step-advantage-w -1 | rl.step_advantage_w = -1: out of range
rl_math --rl.importance-mode sequence | rl.importance_mode = 'sequence': unknown; did you mean sequence_
rl_math --rl.lr-scheduler-type cosin | rl.lr_scheduler_type = 'cosin': unknown; did you mean cosine?
rl_math --rl.min-lr-ratio 1.5 | rl.min_lr_ratio = 1.5: out of range
rl_math --rl.cliprange-value -1 | rl.cliprange_value = -1: out of range
rl_math --rl.mask-truncated-completions 3 | rl.mask_truncated_completions = 3: of the wrong kind
rl_agent --rl.algorithm ppo --rl.gae-level utterance | rl.gae_level = 'utterance': unknown; use one of token, turn
rl_math --rl.algorithm ppo --rl.gae-level turn | rl.gae_level = 'turn': an answer has one turn
rl_math --rl.reward-clip-range 0 | rl.reward_clip_range = 0: out of range
rl_agent --rl.reward-clip-range -1 | rl.reward_clip_range = -1: out of range
rl_math --rl.reward-clip-range inf | rl.reward_clip_range = inf: not finite
evaluate --model.path cola --rl.reward-clip-range 0.5 | rl.reward_clip_range = 0.5: evaluate does not read it
rl_math --rl.gae-lambda 3 | rl.gae_lambda = 3: out of range
rl_math --rl.updates-per-batch 0 | rl.updates_per_batch = 0: out of range
rl_math --rl.num-minibatches 0 | rl.num_minibatches = 0: out of range
rl_math --rl.num-minibatches 100000 | rl.num_minibatches = 100000: more than the sequences of a step
pretrain --rl.num-minibatches 2 | rl.num_minibatches = 2: pretrain does not read it
rl_math --rl.adam-betas 0.9 | rl.adam_betas = (0.9,): too few
rl_math --rl.adam-betas 0.9 1.0 | rl.adam_betas = (0.9, 1.0): out of range
rl_math --rl.adam-betas 0.9 0.95 0.99 | rl.adam_betas = (0.9, 0.95, 0.99)
rl_math --rl.kl-coef -0.1 | rl.kl_coef = -0.1: out of range
rl_math --rl.kl-coef nan | rl.kl_coef = nan: not finite
rl_math --rl.kl-target -1 | rl.kl_target = -1: out of range
rl_math --rl.entropy-coef -inf | rl.entropy_coef = -inf: not finite
rl_math --rl.importance-cap -2 | rl.importance_cap = -2: out of range
rl_math --rl.value-lr 0 | rl.value_lr = 0: out of range
rl_math --rl.target-tau 1.5 | rl.target_tau = 1.5: out of range
rl_math --rl.max-staleness -1 | rl.max_staleness = -1: out of range
rl_math --rl.save-every 0 | rl.save_every = 0: out of range
rl_math --rl.eval-every -5 | rl.eval_every = -5: out of range
rl_math --rl.eval-problems 0 | rl.eval_problems = 0: out of range
rl_math --rl.max-steps 1.5 | rl.max_steps = 1.5: of the wrong kind
rl_math --rl.max-steps 99999999999 | rl.max_steps = 99999999999: out of range
rl_math --rl.group-size 1 | rl.group_size = 1: grpo compares
rl_math --rl.group-size 0 | rl.group_size = 0: out of range
rl_math --rl.prompts-per-step 3 --rl.group-size 3 | rl.prompts_per_step x rl.group_size = 9: does not divide
rl_math --rl.prompts-per-step 5 --cluster.learner-ranks 5 | pretrain.batch_size = 12: does not divide over
rl_math --rl.algorithm gpro | rl.algorithm = 'gpro': unknown; did you mean grpo?
rl_math --rl.algorithm archer | rl.algorithm = 'archer': learns from turns
rl_math --rl.algorithm etpo --rl.kl-coef 0 | rl.kl_coef = 0.0: etpo divides by it
rl_math --rl.action-space tokens | rl.action_space = 'tokens': unknown; did you mean token?
rl_math --rl.action-space token --model.action-every 2 | model.action_every = 2: a token is said once
rl_math --model.action-every 0 | model.action_every = 0: out of range
rl_math --model.action-every 2 --rl.marginal-aliases | rl.marginal_aliases = True: another action that says this token
rl_math --model.action-every 2 --rl.algorithm etpo --rl.actor-free | rl.actor_free = True: Q learns from replay token by
rl_agent --model.action-every 2 | model.action_every = 2: turns of agents are learnt from token by token
pretrain --model.path sized --model.action-every 2 | model.action_every = 2: sized has 1; leave it out
rl_math --rl.lora-rank 8 | rl.lora_rank = 8: for rl.action_space token
rl_math --rl.steering all | rl.steering = 'all': for rl.action_space token
rl_math --rl.steering first | rl.steering = 'first': unknown; use one of off, all, last
rl_math --rl.kl-cof 0.1 | rl.kl_cof = 0.1: no such field; did you mean rl.kl_coef?
rl_math --rl.learning-rate 0.1 | rl.learning_rate = 0.1: no such field; see --help, and docs/names.md
rl_math --rl.action-space token --model.base llama --pretrain.lr 0.1 | pretrain.lr = 0.1: has no effect here
rl_math --rl.action-space token --model.base llama --data.path good.jsonl | data.path = 'good.jsonl': has no effect here
rl_math --rl.action-space token --model.base llama --model.num-actions 3 | model.num_actions = 3: has no effect here
rl_math --rl.action-space token --model.path llama --model.num-actions 3 | model.num_actions = 3: llama is a plain model
rl_math --pretrain.stages base | pretrain.stages = ('base',): RL over latent actions needs more than a base
pretrain --pretrain.stages base --model.num-actions 3 | model.num_actions = 3: has no effect here; the stages actions
evaluate --model.path cola --eval.ways greedy --rollout.top-k 3 | rollout.top_k = 3: has no effect here; of eval.ways
rl_math --rollout.top-kk 9 | rollout.top_kk = 9: no such field; did you mean rollout.top_k?
rl_math --rollout.temperature nan | rollout.temperature = nan: not finite
rl_math --rollout.temperature inf | rollout.temperature = inf: not finite
rl_math --rollout.temperature -1 | rollout.temperature = -1: out of range
rl_math --rollout.temperature 1e-30 | rollout.temperature = 1e-30: out of range; use a number from 0.01 to 100
rl_math --rollout.temperature 1e300 | rollout.temperature = 1e+300: out of range
rl_math --rollout.max-num-seqs 2147483647 | rollout.max_num_seqs = 2147483647: out of range
rl_math --rollout.kv-cache-mb 2147483647 | rollout.kv_cache_mb = 2147483647: of each of 1 engines, and this machine
rl_math --rl.prompts-per-step 2147483647 --rl.group-size 2 | rl.prompts_per_step x rl.group_size = 4294967294: sequences
rl_math --rollout.temperature 0 | rollout.temperature = 0: out of range
rl_math --rollout.top-k 65 | rollout.top_k = 65: the codebook has 16 actions
rl_math --rollout.top-p 0 | rollout.top_p = 0: out of range
rl_math --rollout.top-p 1.5 | rollout.top_p = 1.5: out of range
evaluate --model.path cola --eval.ways greedy --rollout.top-p 0.9 | rollout.top_p = 0.9: has no effect here
rl_math --rollout.top-k -1 | rollout.top_k = -1: out of range
rl_math --rollout.max-new-tokens 0 | rollout.max_new_tokens = 0: out of range
rl_math --rollout.max-new-tokens 100000 | rollout.max_new_tokens = 100000: .* more than the 512 positions
rl_math --model.path short | rollout.max_new_tokens = 6: .* more than the 64 positions of model.path = 'short'
rl_math --rollout.num-workers 0 | rollout.num_workers = 0: out of range
rl_math --rollout.num-workers 1000 | rollout.num_workers = 1000: this machine has
rl_math --rollout.tensor-parallel-size 0 | rollout.tensor_parallel_size = 0: out of range
rl_math --rollout.tensor-parallel-size 2 | rollout.tensor_parallel_size = 2: GPUs that an engine spans
rl_math --rollout.kv-cache-mb -1 | rollout.kv_cache_mb = -1: out of range
rl_math --cluster.use-gpu | cluster.use_gpu = True: this machine has no GPU
rl_math --cluster.colocated | cluster.colocated = True: learner ranks and engines do not share GPUs; give each GPUs of
rl_math --rollout.enforce-eager | rollout.enforce_eager = True: has no effect here; engines on GPUs do, with cluster.use
rl_math --rollout.quantization fp8 | rollout.quantization = 'fp8': its kernels compute in bfloat16; set model.dtype to
rl_math --rollout.quantization int3 | rollout.quantization = 'int3': unknown; use one of none, fp8
rl_math --rollout.kv-cache-dtype fp8 | rollout.kv_cache_dtype = 'fp8': has no effect here; engines on GPUs do
rl_math --rollout.optimization-level 4 | rollout.optimization_level = 4: out of range; use a whole number from 0 to 3
rl_math --rollout.no-async-scheduling | rollout.async_scheduling = False: has no effect here; engines on GPUs do
rl_math --rollout.gpu-memory-utilization 0.5 | rollout.gpu_memory_utilization = 0.5: has no effect here; engines on GPUs
rl_math --rollout.gpu-memory-utilization 1.5 | rollout.gpu_memory_utilization = 1.5: out of range
plan --cluster.use-gpu --rollout.kv-cache-mb 64 | rollout.kv_cache_mb = 64: has no effect here; engines on CPU
rl_math --rollout.max-num-batched-tokens 8 | rollout.max_num_batched_tokens = 8: less than rollout.max_num_seqs
rl_math --rollout.engine-args dtype half | rollout.engine_args.dtype = 'half': learner and engine have one
rl_math --rollout.engine-args enforce_eager True | rollout.engine_args.enforce_eager = True: use rollout.enforce_eager
rl_math --rollout.engine-args blok_size 64 | rollout.engine_args.blok_size = 64: vllm.LLM takes no .* did you mean block
rl_math --rollout.engine-args block_size | rollout.engine_args = block_size: 1 values given; use pairs of a name and
rl_math --cluster.learner-ranks 0 | cluster.learner_ranks = 0: out of range
rl_math --cluster.learner-ranks 64 | cluster.learner_ranks = 64: this machine has
rl_math --cluster.stall-timeout-s 0 | cluster.stall_timeout_s = 0: out of range
rl_math --cluster.stall-timeout-s 1e300 | cluster.stall_timeout_s = 1e+300: out of range
rl_math --cluster.max-failures -1 | cluster.max_failures = -1: out of range
rl_math --cluster.learner-placement packed | cluster.learner_placement = 'packed': unknown
rl_math --cluster.learner-placement STRICT_SPREAD | cluster.learner_placement = 'STRICT_SPREAD': 2 ranks on a node each
rl_math --cluster.rollout-group gpus | cluster.rollout_group = 'gpus': nodes of a cluster
rl_math --cluster.address 127.0.0.1:1 | cluster.address = '127.0.0.1:1': nothing answers at 127.0.0.1:1
rl_math --cluster.address ray://127.0.0.1:1 | cluster.address = 'ray://127.0.0.1:1': nothing answers at 127.0.0.1:1
rl_math --tracking-uri /proc/runs | tracking_uri = '/proc/runs': no folder can be made there
rl_math --tracking-uri file:///proc/runs | tracking_uri = 'file:///proc/runs': no folder can be made there
rl_math --tracking-uri good.jsonl/runs | tracking_uri = 'good.jsonl/runs': no folder can be made there
rl_math --report-to mlflow tensorboards | report_to = ('mlflow', 'tensorboards'): unknown
rl_math --report-to tensorboard --tracking-uri http://h | tracking_uri = 'http://h': has no effect here; with mlflow
rl_math --tracking-uri None | tracking_uri = None: of the wrong kind
rl_math --output-dir None | output_dir = None: of the wrong kind
rl_math --output-dir "~/run" | output_dir = '~/run': ~ is no folder of this name
rl_math -- | --: belongs to no setting
rl_math --cluster.address nowhere | cluster.address = 'nowhere': no address of a Ray cluster
rl_math --cluster.address host:99999 | cluster.address = 'host:99999': no address
rl_math --cluster.address http://head:8265 | cluster.address = 'http://head:8265': a dashboard
rl_math --cluster.use-gpu maybe | cluster.use_gpu = 'maybe': of the wrong kind
rl_math --seed -1 | seed = -1: out of range
rl_math --seed 1.0 | seed = 1.0: of the wrong kind
rl_math --seed 4294967296 | seed = 4294967296: out of range
rl_math --preset tniy | preset = 'tniy': unknown; did you mean tiny?
rl_math --resume maybe | resume = 'maybe': of the wrong kind
rl_math stray words | stray words: belongs to no setting
rl_math --tracking-uri htp://mlflow:5000 | tracking_uri = 'htp://mlflow:5000': unknown scheme htp
rl_math --tracking-uri http:// | tracking_uri = 'http://': names no host
rl_math --tracking-uri http://mlflow:99999 | tracking_uri = 'http://mlflow:99999': port out of range
rl_math --tracking-uri sqlite:///no/folder/x.db | tracking_uri = 'sqlite:///no/folder/x.db': no folder no/folder
rl_math --output-dir good.jsonl | output_dir = .*good.jsonl is a file; give a folder
rl_math --output-dir good.jsonl/run | output_dir = .*good.jsonl is a file; give a folder
rl_math --output-dir /proc/run | output_dir = '/proc/run': /proc cannot be written
rl_math --output-dir s3://bucket/run | output_dir = 's3://bucket/run': an address; give a folder
rl_math --model.num-actions 1 | model.num_actions = 1: out of range
rl_math --model.num-policy-layers 0 | model.num_policy_layers = 0: out of range
rl_math --model.dtype fp32 | model.dtype = 'fp32': unknown; did you mean float32?
rl_math --model.path nope | model.path = 'nope': no such file or folder
rl_math --model.path good.jsonl | model.path = 'good.jsonl': a file; give a CoLA model's folder
rl_math --model.path empty | model.path = 'empty': no config.json in it
rl_math --model.path llama | model.path = 'llama': a plain llama model; make a CoLA model of it
rl_math --model.path gpt2 | model.path = 'gpt2': a 'gpt2' model
rl_math --rollout.top-k 16 --model.num-actions 8 | rollout.top_k = 16: the codebook has 8 actions
rl_math --task.name countdwn | task.name = 'countdwn': unknown task; did you mean countdown?
rl_math --task.name twenty_questions | task.name = 'twenty_questions': an environment of many turns
rl_math --task.name gsm8k | task.path = '': gsm8k needs a folder
rl_math --task.name gsm8k --task.path ./nowhere | task.path = './nowhere': no such file or folder
rl_math --task.name gsm8k --task.path good.jsonl | task.path = 'good.jsonl': a file; give a folder
rl_math --task.name gsm8k --task.path half | task.path = 'half': no test.jsonl in this folder
rl_math --task.name gsm8k --task.path empty | task.path = 'empty': no train.jsonl and no test.jsonl
rl_math --task.name gsm8k --task.path gsmnull | task.path = 'gsmnull/train.jsonl': row 2, field answer: null
rl_math --task.name gsm8k --task.path gsmword | task.path = 'gsmword/train.jsonl': row 2, field answer: no number
rl_math --task.name gsm8k --task.path openai/gsm8k_ | task.path = 'openai/gsm8k_': not in the local cache
rl_math --preset smollm2-135m --task.name math500 | task.path = '': math500 needs a folder
rl_preference --preset smollm2-135m --task.reward-model http://x/ | task.path = '': preference needs rows
rl_math --task.name math500 --task.path math | task.path = 'math/test.jsonl': row 1, field answer: missing
rl_math --task.options max_term 3 | task.options.max_term = 3: no option of chain_sum; did you mean max_terms?
rl_math --task.options seed 3 | task.options.seed = 3: has a setting of its own
rl_math --task.options a | task.options = a: 1 values given
rl_math --task.options x nan | task.options.x = nan: not finite
rl_math --task.num-problems 1 | task.num_problems = 1: out of range
rl_math --task.reward-timeout-s -3 | task.reward_timeout_s = -3: out of range
rl_math --task.max-failed-rewards 2 | task.max_failed_rewards = 2: out of range
rl_math --task.reward-model org/x | task.reward_model = 'org/x': arithmetic has a verifier
rl_math --task.oracle m | task.oracle = 'm': arithmetic asks nobody
rl_math --task.reward exat | task.reward = 'exat': unknown reward; did you mean exact?
rl_math --task.reward own.py | task.reward = 'own.py': a file; name what in it is meant, as own.py:NAME
rl_math --task.reward exact length --task.reward-weights 1 | task.reward_weights = (1.0,): not one for each reward; give
rl_math --task.reward exact --task.right-from nan | task.right_from = nan: not finite
rl_math --task.reward exact --task.length 0 | task.length = 0: out of range; use a whole number of at least 1
rl_math --task.name dataset --task.path good.jsonl | task.reward = (): rows do not say what a response is worth
rl_math --task.name dataset --task.path unparsed.jsonl --task.reward exact | task.path = 'unparsed.jsonl': .*line 2: not
rl_math --task.name dataset --task.path good.jsonl --task.columns promt x | task.columns.promt = 'x': no such name
rl_math --task.columns prompt x | task.columns.prompt = 'x': has no effect here; dataset does
data --task.name twenty_questions | task.name = 'twenty_questions': an environment of many turns
rl_math --task.name own:Nothing | task.name = 'own:Nothing': Nothing has no problems and no demonstrations and no score
rl_math --task.name own:Missing | task.name = 'own:Missing': own has no Missing
rl_math --task.name own:NUMBER | task.name = 'own:NUMBER': NUMBER is int, not a class
rl_math --task.name nowhere:Task | task.name = 'nowhere:Task': No module named 'nowhere'
rl_math --task.name bad_own:Task | task.name = 'bad_own:Task': importing bad_own raised ZeroDivisionError
rl_math --task.name exits:Task | task.name = 'exits:Task': importing exits raised SystemExit
rl_math --task.name own:Arguments | task.name = 'own:Arguments': Arguments is called with (TaskConfig, seed)
rl_math --task.name own:Inherits | task.name = 'own:Inherits': Inherits raised TypeError: Inherits.__init__() takes 3
rl_math --task.name own:Raises | task.name = 'own:Raises': Raises raised KeyError: 'corpus' (own.py:
rl_math --task.name own:Empty | task.name = 'own:Empty': Empty has no problems to train on
rl_math --task.name own:Fields | task.name = 'own:Fields': Fields gives tuple as a problem, which has no
rl_math --task.name own:Number | task.name = 'own:Number': Number has a first problem whose solution is 7
rl_math --task.name own:Score | task.name = 'own:Score': Score gives the score None to its own solution
rl_agent --task.name own:Plays | task.name = 'own:Plays': Plays gives 'hello' from reset
rl_agent --task.name own:Turns | task.name = 'own:Turns': Turns has max_turns = 0
rl_agent --task.name own:HalfPlays | task.name = 'own:HalfPlays': HalfPlays has no reset; cola_ray/tasks/environment.py
rl_agent --task.name arithmetic | task.name = 'arithmetic': not an environment
rl_agent --task.options skil 3 | task.options.skil = 3: twenty_questions takes objects, skill
rl_agent --task.options objects 0 | task.options.objects = 0: out of range; use a whole number from 2 to 157
rl_agent --task.options objects 10000 | task.options.objects = 10000: out of range
rl_agent --task.options objects x | task.options.objects = 'x': of the wrong kind
rl_agent --task.name shop --task.options num_products 3 | task.options.num_products = 3: out of range
rl_agent --task.name shop --task.options products 50 | task.options.products = 50: shop takes num_products, catalogue_
rl_agent --task.name household --task.options num_receptacles 4 | task.options.num_receptacles = 4: out of range
rl_agent --task.name household --task.options num_objects 2 | task.options.num_objects = 2: out of range
rl_agent --task.name household --task.options max_turns 10 | task.options.max_turns = 10: out of range
rl_agent --task.name household --task.options skill 1.5 | task.options.skill = 1.5: out of range
rl_agent --task.name household --task.options rooms 3 | task.options.rooms = 3: household takes num_receptacles, num_ob
rl_agent --task.options skill 7 | task.options.skill = 7: out of range; use a number from 0 to 1
rl_math --task.options min_terms 9 | task.options = {'min_terms': 9}: AssertionError: max_terms must be >= min_terms
rl_agent --critic.gamma 1.1 | critic.gamma = 1.1: out of range
rl_agent --critic.expectile 0.3 | critic.expectile = 0.3: an expectile up to 0.5
rl_agent --critic.td-share 2 | critic.td_share = 2: out of range
rl_agent --critic.priority-beta -1 | critic.priority_beta = -1: out of range
rl_agent --critic.replicas 0 | critic.replicas = 0: out of range
rl_agent --replay.kept-share 0 | replay.kept_share = 0: out of range
rl_agent --replay.max-rows 0 | replay.max_rows = 0: out of range
rl_agent --task.name jericho --task.game none.z5 | task.*
rl_preference --task.path pairs.jsonl | task.reward_model = '': preference has no verifier
rl_preference --task.path odd.jsonl --task.reward-model http://x/ | task.path = 'odd.jsonl': row 1, field prompt: '3'
rl_preference --task.name arithmetic | task.name = 'arithmetic': rl_preference learns from a reward model; use
rl_preference --task.name guess_city | task.name = 'guess_city': rl_preference learns .* use `cola_ray agent`
rl_preference --task.path pairs.jsonl --task.reward-model plain | task.reward_model = 'plain': LlamaForCausalLM,
rl_preference --task.path pairs.jsonl --task.reward-model http://127.0.0.1:1/ | task.reward_model = .* nothing answers
rl_preference --task.path pairs.jsonl --task.reward-model http:// | task.reward_model = 'http://': names no host
rl_preference --task.path pairs.jsonl --task.reward-model ./none | task.reward_model = './none': no such file
rl_preference --task.path pairs.jsonl --task.reward-model empty | task.reward_model = 'empty': no config.json in it
reward_model --task.path pairs.jsonl | model.base = '': a reward model starts from a base
reward_model --model.base llama | task.path = '': preference needs rows
reward_model --model.base llama --task.path lonely.jsonl | task.path = 'lonely.jsonl': row 1, field chosen: missing
reward_model --model.base llama --task.name gsm8k --task.path gsm | task.name = 'gsm8k': reward models learn from
pretrain --pretrain.stages policy base | pretrain.stages = ('policy', 'base'): not in order
pretrain --pretrain.stages base policy | pretrain.stages = ('base', 'policy'): a new base has no actions yet
pretrain --pretrain.stages actions actions | pretrain.stages = ('actions', 'actions'): 'actions' twice
pretrain --pretrain.stages | pretrain.stages = (): too few
pretrain --pretrain.stages policy | pretrain.stages = ('policy',): policy needs a model that has actions
pretrain --model.path sized --pretrain.stages base actions | pretrain.stages = ('base', 'actions'): base trains a base
pretrain --model.base llama --pretrain.stages fta_policy | pretrain.stages = ('fta_policy',): fta_policy needs a model
pretrain --pretrain.stages actions policy | pretrain.stages = ('actions', 'policy'): there is no base
rl_math --pretrain.stages actions policy | pretrain.stages = ('actions', 'policy'): there is no base
pretrain --model.path sized --model.num-actions 8 | model.num_actions = 8: sized has 16; leave it out
pretrain --model.base llama --data.chat-options.thinks false | data.chat_options.thinks = False: the model's chat
pretrain --data.path good.jsonl --data.prompt-field answer | data.response_field = 'answer': the column of prompts, too
pretrain --pretrain.stages acts | pretrain.stages = ('acts',): unknown; did you mean actions?
pretrain --pretrain.steps.bas 3 | pretrain.steps.bas = 3: no such name; did you mean base?
pretrain --pretrain.steps.base 0 | pretrain.steps.base = 0: out of range
pretrain --pretrain.max-steps 0 | pretrain.max_steps = 0: out of range
pretrain --pretrain.batch-size 5 | pretrain.batch_size = 5: does not divide over
pretrain --pretrain.sequence-length 1 | pretrain.sequence_length = 1: out of range
pretrain --pretrain.sequence-length 100000 | pretrain.sequence_length = 100000: more than the 512 positions
pretrain --pretrain.gumbel-tau 0 | pretrain.gumbel_tau = 0: out of range
pretrain --pretrain.min-lr-ratio 1.2 | pretrain.min_lr_ratio = 1.2: out of range
pretrain --model.base org/nope | model.base = 'org/nope': not in the local cache, and HF_HUB_OFFLINE is set
pretrain --model.base "no such model" | model.base = 'no such model': neither an existing path nor a hub id
pretrain --model.base ./nowhere | model.base = './nowhere': no such file or folder
pretrain --model.base nowhere.gguf | model.base = 'nowhere.gguf': no such file or folder
pretrain --model.base broken.gguf | model.base = 'broken.gguf': its header is broken or cut short
pretrain --model.base data.csv | model.base = 'data.csv': a file of type '.csv'
pretrain --model.base empty | model.base = 'empty': no config.json in it
pretrain --model.base cutconfig | model.base = 'cutconfig': cutconfig/config.json is not complete JSON
pretrain --model.base gpt2 | model.base = 'gpt2': a 'gpt2' model; CoLA attaches to llama, mistral, qwen2, qwen3
pretrain --model.base mixtral | model.base = 'mixtral': a 'mixtral' model, whose layers are mixtures of experts
pretrain --model.base windowed | model.base = 'windowed': use_sliding_window is set
pretrain --model.base llama --model.family nowhere.py:MINE | model.family = 'nowhere.py:MINE': no such file nowhere.py
pretrain --model.path cola --model.family math:pi | model.family = 'math:pi': has no effect here; a run without
pretrain --model.base narrow | model.base = 'narrow': heads of 16; vLLM on CPU needs 32
pretrain --model.base biased | model.base = 'biased': attention_bias is set, and vLLM's o_proj of this family has no
pretrain --model.base quantised | model.base = 'quantised': quantised by awq
pretrain --model.base wide | model.base = 'wide': its tokenizer has ids up to 8 and the embeddings 8 rows
pretrain --model.base torn | model.base = 'torn': its embeddings have 6 rows and its config.json says 8
pretrain --model.base mute | model.base = 'mute': no tokenizer in it
pretrain --model.base cut | model.base = 'cut': model.safetensors cannot be read
pretrain --model.base lost | model.base = 'lost': model-00002-of-00002.safetensors is missing
pretrain --model.path nope | model.path = 'nope': no such file or folder
pretrain --model.path llama | model.path = 'llama': a plain llama model
pretrain --data.path ./nowhere.jsonl | data.path = './nowhere.jsonl': no such file or folder
pretrain --data.path data.csv | data.path = 'data.csv': row 1: has columns a, b; name the right ones
pretrain --data.path empty | data.path = 'empty': no .jsonl, .json, .parquet, .csv or .txt file
pretrain --data.path void.jsonl | data.path = 'void.jsonl': empty
pretrain --data.path null.jsonl | data.path = 'null.jsonl': row 2, field answer: 'None' is neither
pretrain --data.path missing.jsonl | data.path = 'missing.jsonl': row 1: has columns question; name the right ones
pretrain --data.path good.jsonl --data.prompt-field x | data.path = 'good.jsonl': row 1: has columns question, answer
pretrain --data.path unparsed.jsonl | data.path = 'unparsed.jsonl': unparsed.jsonl, line 2: not JSON
pretrain --data.path list.jsonl | data.path = 'list.jsonl': list.jsonl, line 1: [1, 2]; an object
pretrain --data.path bom.jsonl | data.path = 'bom.jsonl': bom.jsonl, line 1: begins with a byte order mark
pretrain --data.path latin.jsonl | data.path = 'latin.jsonl': latin.jsonl, line 1: not UTF-8
pretrain --data.path org/corpus | data.path = 'org/corpus': not in the local cache
pretrain --data.text-field "" | data.text_field = '': empty
pretrain --data.path "no*.jsonl" | data.path = 'no*.jsonl': no .jsonl, .json, .parquet, .csv or .txt file matches
pretrain --data.path "n*.jsonl" | data.path = 'n*.jsonl': null.jsonl, row 2, field answer: 'None' is neither
pretrain --data.path good.jsonl --data.more-paths ./none.jsonl | data.more_paths = './none.jsonl': no such file
pretrain --data.path good.jsonl --data.more-paths pairs.jsonl | data.more_paths = 'pairs.jsonl': row 1: has columns
pretrain --data.path good.jsonl --data.more-paths good.jsonl | data.more_paths = ('good.jsonl',): data.path is there
pretrain --data.more-paths good.jsonl | data.more_paths = ('good.jsonl',): has no effect here; rows of data.path do
pretrain --data.path good.jsonl --data.weights 1 2 | data.weights = (1.0, 2.0): not one for each source; give 1
pretrain --data.path good.jsonl --data.weights 0 | data.weights = (0,): out of range
pretrain --data.path good.jsonl --data.streaming | data.streaming = True: files are read as they are
pretrain --data.path good.jsonl --data.max-broken 1 | data.max_broken = 1.0: there may be nothing left
pretrain --data.path good.jsonl --data.cache void.jsonl | data.cache = .*void.jsonl is a file; give a folder
pretrain --data.path good.jsonl --data.cache /proc/corpus | data.cache = '/proc/corpus': /proc cannot be written
pretrain --data.path good.jsonl --data.cache "~/corpus" | data.cache = '~/corpus': ~ is no folder of this name
pretrain --data.path good.jsonl --data.cache s3://b/corpus | data.cache = 's3://b/corpus': an address; give a folder
pretrain --pretrain.states model --pretrain.states-cache void.jsonl | pretrain.states_cache = .*void.jsonl is a file
pretrain --pretrain.states model --pretrain.stages base | pretrain.states = 'model': has no effect here; the stages
pretrain --pretrain.states model --pretrain.states-gb 0 | pretrain.states_gb = 0: out of range
pretrain --data.path good.jsonl --data.processes 4000 | data.processes = 4000: this machine has
rl_math --model.path cola --data.cache new | data.cache = 'new': has no effect here
atlas --model.path cola --data.path good.jsonl --data.processes 3 | data.processes = 3: atlas does not read it
diversity --model.path cola --data.path good.jsonl --data.weights 1 | data.weights = (1.0,): diversity does not read
train_q --model.path cola --data.path good.jsonl --data.max-broken 0.1 | data.max_broken = 0.1: train_q does not read it
pretrain --data.date yesterday | data.date = 'yesterday': Invalid isoformat string
pretrain --task.name data_science --task.path good.jsonl | task.path = 'good.jsonl': a file of type '.jsonl'
train_q --model.path cola | data.path = '': Q learns from logged answers
train_q --model.path cola --data.path good.jsonl | data.path = 'good.jsonl': row 1, field prompt_ids: missing
train_q --model.path cola --data.path good.jsonl --q.lr 0 | q.lr = 0: out of range
evaluate --model.path cola --eval.ways | eval.ways = (): too few
evaluate --model.path cola --eval.ways greedly | eval.ways = ('greedly',): unknown; did you mean greedy?
evaluate --model.path cola --eval.ways sample sample | eval.ways = ('sample', 'sample'): 'sample' twice
evaluate --model.path cola --eval.ways mcts_q | q.path = '': mcts_q asks a Q
evaluate --model.path cola --eval.ways mcts_q --q.path empty | q.path = 'empty': no q.safetensors in it
evaluate --model.path cola --eval.ways mcts_q --q.path q | q.path = 'q': values of 8 actions, and the model has 16
evaluate --model.path cola --eval.ks 1 64 | eval.ks = (1, 64): of search.simulations = 32 samples
evaluate --model.path cola --rl.kl-coef 0.3 | rl.kl_coef = 0.3: has no effect here
evaluate --model.path cola --eval.ks 0 | eval.ks = (0,): out of range
evaluate --model.path cola --eval.split test | eval.split = 'test': unknown; use one of heldout, train
evaluate --model.path cola --search.simulations 0 | search.simulations = 0: out of range
evaluate --model.path cola --search.c-puct nan | search.c_puct = nan: not finite
evaluate --model.path cola --task.name preference --task.path pairs.jsonl | task.name = 'preference': has no verifier
evaluate --model.path cola --task.name twenty_questions --eval.ways mcts | eval.ways = 'mcts': searches answers of one
evaluate --model.path none | model.path = 'none': no such file or folder
atlas --model.path empty | model.path = 'empty': no config.json in it
atlas --model.path cola --data.path ./none.txt | data.path = './none.txt': no such file or folder
diversity --model.path cola --diversity.continuations 1 | diversity.continuations = 1: out of range
capabilities --model.path cola | harness.tasks = (): nothing to score on
capabilities --model.path cola --harness.likelihoods best | harness.likelihoods = ('best',): unknown
sweep --sweep.values | sweep.values = (): too few
sweep --sweep.seeds 0 0 | sweep.seeds = (0, 0): 0 twice
sweep --sweep.seeds -1 | sweep.seeds = (-1,): out of range
sweep --sweep.values True | rl.kl_coef = True: of the wrong kind
sweep --sweep.values -1 | rl.kl_coef = -1: out of range
sweep --sweep.field rl.klcoef | sweep.field = 'rl.klcoef': no such field; did you mean rl.kl_coef?
sweep --sweep.field output_dir --sweep.values a | sweep.field = 'output_dir': each run has its own
sweep --sweep.field overwrite --sweep.values True | sweep.field = 'overwrite': each run has its own, or all have one
sweep --sweep.field preset --sweep.values tiny | sweep.field = 'preset': each run has its own, or all have one
sweep --sweep.field cluster.address --sweep.values a:1 | sweep.field = 'cluster.address': each run has its own
sweep --rl.kl-coef 0.5 | rl.kl_coef = 0.5: has no effect here; sweep.values do
sweep --sweep.parallel -1 | sweep.parallel = -1: out of range
sweep --sweep.asha --rl.max-steps 4 | sweep.grace_steps = 10: no run would be stopped early
reproduce --reproduce.stages archer | reproduce.stages = 'archer': no such stage; did you mean agent_archer?
reproduce --reproduce.parallel -1 | reproduce.parallel = -1: out of range
reproduce --task.name dataset --task.path good.jsonl | task.name = 'dataset': has no verifier, which stages ask
plan --hardware.gpu b300 | hardware.gpu = 'b300': unknown
plan --hardware.network-gbs 0 | hardware.network_gbs = 0: out of range
plan --hardware.response-spread 5 | hardware.response_spread = 5: out of range
plan --hardware.response-tokens 300 | hardware.response_tokens = 300: more than rollout.max_new_tokens
""".strip().splitlines()


@pytest.fixture
def in_here(here, monkeypatch):
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = machine._unreachable
    monkeypatch.setattr(machine, "_unreachable", lambda host, port: asked(host, port) if port == 1 else "")
    return here


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, in_here, capsys):
    command, _, expected = case.partition(" | ")
    job, *argv = shlex.split(command)
    with pytest.raises(SystemExit) as caught:
        from_command_line(job, argv)
    assert caught.value.code == 2
    said = capsys.readouterr().err.splitlines()
    pattern = ".*".join(map(re.escape, expected.split(".*")))
    assert any(re.match(pattern, line) for line in said), said
    for line in said:
        assert re.match(r"[\w. ]+ = .*: .*[^ ]", line) or "belongs to no setting" in line, line


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (errno.ENOSPC, "no space left on device"),
        (errno.EROFS, "read-only file system"),
        (errno.EDQUOT, "disk quota exceeded"),
        (errno.EIO, "input/output error"),
    ],
)
def test_a_folder_that_takes_nothing_is_refused_before_ray_starts(code, why, in_here, monkeypatch, capsys):
    """What is written there must also get to the disk."""

    def full(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as caught:
        from_command_line("rl_math", ["--output-dir", "new/run"])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"output_dir = '{in_here / 'new/run'}': {in_here} cannot be written ({why}); give")
    assert not (in_here / "new").exists()
    assert not list(in_here.glob(".cola_ray-*"))


@pytest.mark.parametrize("name", ["new/" + "x" * 256, "/".join(["y" * 200] * 20)])
def test_a_name_that_no_file_system_takes_is_refused(name, in_here, capsys):
    with pytest.raises(SystemExit) as caught:
        from_command_line("rl_math", ["--output-dir", name])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(
        r"output_dir = '.*': (too long a name for this file system; give a shorter one|file name too)", line
    )


ACCEPTED = """
rl_math --preset tiny --rl.kl-coef 0.01 --seed 1
rl_math --preset tiny --rl.kl_coef=0.01 --no-resume --rl.no-actor-free
rl_math --rl.algorithm etpo --rl.kl-coef 0.05 --rl.actor-free
rl_math --rl.action-space token --rl.lr 1e-4 --rl.lora-rank 16
rl_math --rl.loss gspo --rl.loss-agg-mode seq-mean-token-mean --rl.clip-low 3e-4 --rl.updates-per-batch 4
rl_math --rl.loss ppo --rl.clip-c 3 --rl.updates-per-batch 2 --rl.scale-rewards none
rl_math --rl.max-staleness 1 --tracking-uri http://mlflow:5000
rl_math --tracking-uri sqlite:///runs.db --cluster.address 10.0.0.7:6379
rl_math --cluster.address ray://head:10001 --cluster.use-gpu
rl_math --model.path cola --rl.max-steps 2
rl_math --task.name countdown --task.thinking --rollout.max-prompt-tokens 160 --rollout.max-new-tokens 24
rl_math --task.name gsm8k --task.path gsm --rollout.max-new-tokens 100
rl_math --task.options max_terms 2
rl_math --task.reward exact length --task.reward-weights 1 0.1 --task.right-from 1 --task.length 8
rl_math --task.name dataset --task.path good.jsonl --task.reward math
data --task.name dataset --task.path good.jsonl --task.reward math
data
rl_math --task.name own:Good
rl_math --task.name own:ByOf
rl_agent
rl_agent --rl.algorithm grpo --rl.group-size 8 --rl.prompts-per-step 8
rl_agent --task.options objects 20 skill 0.3
rl_agent --task.name shop --task.options num_products 200 page_size 5
rl_agent --task.name household --task.options num_receptacles 12 max_turns 50
rl_agent --task.name own:Game
rl_preference --task.path pairs.jsonl --task.reward-model http://scores:8000/
reward_model --task.path pairs.jsonl --model.base llama
pretrain --preset tiny
pretrain --model.base llama --data.path good.jsonl --pretrain.max-steps 5
pretrain --model.base llama --data.path "goo*.jsonl" --data.weights 2 --data.cache new --data.processes 1
pretrain --model.base llama --data.path null.jsonl --data.max-broken 0.5
pretrain --model.path cola --pretrain.stages fta_idm fta_policy --data.path good.jsonl
pretrain --pretrain.steps.base 800 --pretrain.stages base
pretrain --pretrain.batch-size 12 --cluster.learner-ranks 3
rl_math --model.path cola --rl.prompts-per-step 5 --cluster.learner-ranks 5
reward_model --task.path pairs.jsonl --model.base llama --pretrain.batch-size 9 --cluster.learner-ranks 3
evaluate --model.path cola
evaluate --model.path cola --rl.actor-free --rl.algorithm etpo --rl.kl-coef 0.05
evaluate --model.path cola --eval.ways sample --eval.ks 1 8 --search.simulations 8
evaluate --model.path cola --eval.ways sample --search.simulations 8
pretrain --model.path cola --pretrain.stages policy --data.path good.jsonl
evaluate --model.path cola --eval.ways sample mcts --search.simulations 64 --eval.problems 512
evaluate --model.path cola --task.name math500 --task.path maths --rollout.max-new-tokens 100
atlas --model.path cola --data.path good.jsonl
sweep --sweep.field rl.lr --sweep.values 1e-4 5e-4 --sweep.seeds 0 1 2 --sweep.asha
sweep --task.name twenty_questions
sweep --sweep.field task.thinking --sweep.values True False
plan --preset llama-3.1-8b --hardware.gpus 16
""".strip().splitlines()


@pytest.mark.parametrize("line", ACCEPTED)
def test_what_makes_sense_is_not_refused(line, in_here):
    job, *argv = shlex.split(line)
    from_command_line(job, argv)


@pytest.mark.parametrize("field", ["output_dir", *PATHS])
def test_paths_that_the_system_will_not_look_at(field, in_here, capsys):
    with pytest.raises(SystemExit) as caught:
        from_command_line("rl_math", [f"--{field.replace('_', '-')}", "./" + 300 * "x"])
    assert caught.value.code == 2
    assert re.search(rf"^{field} = .*: file name too long; ", capsys.readouterr().err, re.MULTILINE)


def test_bytes_that_are_no_text(in_here, capsys):
    with pytest.raises(SystemExit) as caught:
        from_command_line("rl_math", ["--output-dir", os.fsdecode(b"r\xfcn")])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "output_dir = 'r\\udcfcn': not UTF-8; give another name\n"


def test_a_folder_that_is_gone(in_here, tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit) as caught:
        from_command_line("rl_math", [])
    assert caught.value.code == 2
    assert "the folder that this was started in is gone" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    ["rl_agent --task.name arithmetic", "rl_math --output-dir good.jsonl", "rl_agent --task.name twenty_question"],
)
def test_one_mistake_is_one_line(line, in_here, capsys):
    job, *argv = shlex.split(line)
    with pytest.raises(SystemExit):
        from_command_line(job, argv)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_stray_config_is_not_the_start_models(in_here, capsys):
    (in_here / "config.json").write_text("{}")
    with pytest.raises(SystemExit):
        from_command_line("rl_math", ["--rollout.top-k", "65"])
    assert "rollout.top_k = 65: the codebook has 16 actions" in capsys.readouterr().err


def test_all_mistakes_are_reported_together(in_here, capsys):
    argv = "--rl.lr -1 --rl.kl-cof 3 --pretrain.stages policy base --model.path nope --seed x --rollout.top-k 99"
    with pytest.raises(SystemExit):
        from_command_line("rl_math", argv.split())
    said = capsys.readouterr().err.splitlines()
    wrong = ["model.path", "pretrain.stages", "rl.kl_cof", "rl.lr", "rollout.top_k", "seed"]
    assert sorted(line.split(" = ")[0] for line in said if " = " in line) == wrong


@pytest.mark.parametrize(
    "words",
    [
        ["jobs/rl_math.py", "--rl.lr", "nan", "--model.path", "nope"],
        ["jobs/rl_agent.py", "--task.options", "skil", "3"],
        ["-m", "cola_ray", "pretrain", "--task.name", "countdwn"],
        ["jobs/sweep_kl.py", "--sweep.field", "rl.klcoef"],
        ["jobs/reproduce.py", "--reproduce.stages", "archer"],
        ["-m", "cola_ray", "evaluate", "--help"],
        ["-m", "cola_ray", "--help"],
        ["-m", "cola_ray", "status", "--help"],
        ["-c", "import cola_ray"],
    ],
)
def test_nothing_heavy_is_imported_to_refuse_or_explain(words):
    timed = subprocess.run(
        [sys.executable, "-X", "importtime", *words], capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"},
    )  # fmt: skip
    assert timed.returncode == (0 if {"--help", "-c"} & set(words) else 2), timed.stderr[-500:]
    imported = {
        line.rpartition("|")[2].strip() for line in timed.stderr.splitlines() if line.startswith("import time:")
    }
    assert imported & set(HEAVY) == set()


def test_the_auto_classes_know_cola_when_transformers_is_imported_later():
    words = (
        "import cola_ray, sys; assert 'torch' not in sys.modules; from transformers import AutoConfig, "
        "AutoModelForCausalLM as Auto; assert type(AutoConfig.for_model('cola')) in Auto._model_mapping"
    )
    subprocess.run([sys.executable, "-c", words], check=True)


def test_generators_are_read_from_the_sources_as_the_package_registers_them():
    from dataclasses import fields

    from reasoning_gym.factory import DATASETS

    assert set(generators()) == set(DATASETS)
    for name, options in generators().items():
        assert set(options) == {field.name for field in fields(DATASETS[name][1])}, name


def test_every_number_has_a_limit_and_every_setting_a_meaning():
    for field, schema in schemas().items():
        assert schema["description"], field
        said = json.dumps(schema)
        if '"number"' in said or '"integer"' in said:
            # As the swept field, the task, the template and vLLM limit them.
            free = ("sweep.values", "task.options", "data.chat_options", "rollout.engine_args")
            assert field in free or re.search(r'"(exclusiveM|m)inimum"', said), field
    assert Config().seed == 0


def helped(job, capsys, *words):
    """What --help of a job prints, and its flags."""
    with pytest.raises(SystemExit) as caught:
        from_command_line(job, [*words, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    return shown, re.findall(r"^  (--[\w.-]+)", shown, re.MULTILINE)


def test_the_help_says_what_flags_are_with_the_presets_defaults(capsys):
    shown, flags = helped("plan", capsys, "--preset", "llama-3.1-8b")
    assert shown.startswith("cola_ray plan: what a run needs")
    assert len(flags) == len(schemas())
    assert "--model.base meta-llama/Llama-3.1-8B" in shown
    assert "other jobs" not in shown


@pytest.mark.parametrize("job", [job for job in _READ if job != "plan"])
def test_the_help_has_what_the_job_reads_and_says_where_the_rest_belongs(job, capsys):
    shown, flags = helped(job, capsys)
    fields = {flag.removeprefix("--").replace(".no-", ".").replace("-", "_") for flag in flags}
    read = {field for field in schemas() if reads(job, field)}
    assert fields == read
    elsewhere = shown.rpartition("Other settings belong to other jobs")[2]
    for branch in {field.partition(".")[0] for field in {*schemas()} - read}:
        assert re.search(rf"\b{branch}\b", elsewhere), branch


# --- rows and checkpoints -------------------------------------------------------------------------------------------


def text_of(row):
    from cola_ray.tasks.rows import cell, plain_text

    return cell(row, "answer", plain_text)


def test_rows_are_named_with_file_row_and_field(tmp_path):
    lines(tmp_path / "a.jsonl", {"answer": "1"}, {"answer": "2"})
    lines(tmp_path / "b.jsonl", {"answer": "3"}, {"answer": None}, {"answer": ""})
    with pytest.raises(ValueError, match=r"b.jsonl, row 2, field answer: null; text is expected") as caught:
        read_rows(open_rows(str(tmp_path), "data.path"), str(tmp_path), "data.path", text_of)
    assert "(2 of 5 rows are wrong)" in str(caught.value)


def test_numbers_are_read_as_they_are_written(tmp_path):
    for value, text in ((72, "72"), (72.0, "72"), (0.5, "0.5"), (-3, "-3")):
        assert text_of({"answer": value}) == text
    for value in (True, None, [], {}, " ", float("nan")):
        with pytest.raises(ValueError, match=r"field answer: .*; text is expected"):
            text_of({"answer": value})


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.jsonl", b'{"answer": "1"}\n{"answer": 2', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"answer": "1"}\n\n[3]\n', r"a.jsonl, line 3: \[3\]; an object with fields is expected"),
        ("a.jsonl", b'\xff\xfe{\x00"\x00', "a.jsonl, line 1: begins with a byte order mark"),
        ("a.jsonl", b'{"answer": "1"}\n{"answer": "\xe9"}', "a.jsonl, line 2: not UTF-8"),
        ("a.jsonl", b"\n\n", "a.jsonl.* no rows"),
        ("a.json", b'[{"answer": "1"}, {"answer": ]', "a.json, line 1: not JSON"),
        ("a.json", b'"text"', "a.json: not a list of objects"),
        ("a.parquet", b"PAR1 and nothing else", "a.parquet: cannot be read as Parquet"),
    ],
)
def test_files_that_cannot_be_read_are_named(name, content, line, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert re.search(line, peek(str(tmp_path), "data.path", text_of)[0])
    with pytest.raises(ValueError, match=r"^data.path = .*") as caught:
        read_rows(open_rows(str(tmp_path), "data.path"), str(tmp_path), "data.path", text_of)
    assert re.search(line, str(caught.value))


def test_columns_of_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"reply": ["1"]}), tmp_path / "a.parquet")
    assert peek(str(tmp_path), "data.path", text_of) == [
        f"data.path = {str(tmp_path)!r}: a.parquet, row 1, field answer: missing; the row has reply"
    ]


def test_a_gguf_file_states_its_shape(tmp_path):
    def text(said):
        return struct.pack("<Q", len(said)) + said.encode()

    def number(name, value):
        return text(name) + struct.pack("<II", 4, value)

    tokens = text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 3) + text("a") + text("b") + text("c")
    pairs = [text("general.architecture") + struct.pack("<I", 8) + text("llama"), tokens,
             number("llama.context_length", 2048), number("llama.embedding_length", 576),
             number("llama.attention.head_count", 9)]  # fmt: skip
    tensor = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 576, 3, 0, 0)
    file = tmp_path / "base.gguf"
    file.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 1, len(pairs)) + b"".join([*pairs, tensor]) + bytes(64))
    shape = shape_of(file)
    assert (shape.kind, shape.head, shape.positions, shape.vocabulary) == ("llama", 64, 2048, 3)
    assert faults(file) == []
    file.write_bytes(file.read_bytes()[:60])
    assert faults(file) == ["its header is broken or cut short; copy it again"]
