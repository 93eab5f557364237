"""Parts 1 and 2 of benchmarks/gpu.py: models, losses and updates with torch and transformers alone, then in ZeRO-3."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import ranks
import torch
from gpu_bench import Bench, Figure
from torch import Tensor


def sampling(bench: Bench) -> Iterator[Figure]:
    """Draws of latent actions and of tokens on the device against the CPU's, also from a CUDA graph."""
    from cola_ray.model.modeling_cola import sample_actions

    def inputs(rows: int, columns: int) -> list[Tensor]:
        draw = torch.Generator().manual_seed(1)
        return [
            3 * torch.randn(rows, columns, generator=draw), torch.rand(rows, generator=draw).round(decimals=1),
            torch.randint(0, columns // 2, (rows,), generator=draw),
            torch.randint(0, 1 << 60, (rows,), generator=draw), torch.arange(rows), torch.full((rows,), -1),
        ]  # fmt: skip

    for name, rows, columns in (("actions", 4096, bench.size.shape["num_actions"]),
                                ("tokens", 256, bench.size.shape["vocab_size"])):  # fmt: skip
        given = inputs(rows, columns)
        there = [one.to(bench.device) for one in given]
        (wanted, scores), (drawn, found) = sample_actions(*given), sample_actions(*there)  # type: ignore[arg-type]
        yield Figure(f"{name} that differ from the CPU's", float((drawn.cpu() != wanted).sum()), f"of {rows}")
        same = drawn.cpu() == wanted
        yield Figure(f"{name}: |log-probability - CPU's|", float((found.cpu() - scores)[same].abs().max()), "")
        took = bench.seconds(lambda: sample_actions(*there))  # type: ignore[arg-type]  # noqa: B023  # called at once
        yield bench.of_bytes(f"{name}: a draw of {rows} rows", took, rows * columns * 4)
        if bench.device.type == "cuda":
            yield _captured(name, sample_actions, there, drawn)


def _captured(name: str, draw: Callable[..., Any], given: list[Tensor], wanted: Tensor) -> Figure:
    """Capture a draw in a CUDA graph, which is possible because it never waits for the host."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        draw(*given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = draw(*given)
    graph.replay()
    torch.cuda.synchronize()
    return Figure(f"{name} of a CUDA graph that differ", float((out != wanted).sum()), f"of {len(wanted)}")


@torch.no_grad()
def model(bench: Bench) -> Iterator[Figure]:
    """A forward pass of base, policy and world model; bfloat16 against float32 with a few layers."""
    from cola_ray.studies import planned_work

    few = {"num_hidden_layers": min(4, bench.size.shape["num_hidden_layers"])}
    exact, ids = bench.model(torch.float32, **few), bench.tokens()

    def logits(of: Any) -> tuple[Tensor, Tensor]:
        e = of.encode(ids)
        policy = of.policy_logits(e).float()
        return policy.log_softmax(-1), of.world_model_logits(e[:, -1], exact_actions[:, -1])

    exact_actions = exact.policy_logits(exact.encode(ids)).argmax(-1)
    fine = logits(exact)
    for parameter in exact.parameters():  # not the buffers: rotary frequencies stay float32 in a bfloat16 model, too
        parameter.data = parameter.data.to(torch.bfloat16)
    rough = logits(exact)
    del exact
    difference = (rough[0] - fine[0]).abs()
    yield Figure("bfloat16: mean |log-probability - float32's|", float(difference.mean()), "")
    yield Figure("bfloat16: the largest", float(difference.max()), "")
    same = (rough[1].argmax(-1) == fine[1].argmax(-1)).float().mean()
    yield Figure("bfloat16: same token given the action", float(same), "of 1")
    whole = bench.model()

    def forward() -> Tensor:
        e = whole.encode(ids)
        return whole.world_model_logits(e, whole.policy_logits(e).argmax(-1))

    flops = ids.numel() * planned_work.generating(bench.sizes(), ids.shape[1])
    yield bench.of_flops(f"forward pass of {ids.numel()} tokens", bench.seconds(forward), flops)


def update(bench: Bench) -> Iterator[Figure]:
    """The policy's update over latent actions: two micro-batches and an Adam step, everything on one rank."""
    from cola_ray.learner.micro_batch import Advantages, Frozen, MicroBatch
    from cola_ray.learner.objective import policy_objective
    from cola_ray.learner.policies import LatentPolicy, forward
    from cola_ray.settings.config import override
    from cola_ray.settings.presets import preset
    from cola_ray.studies.planned_work import Rows, learning

    config = override(preset("llama-3.1-8b"), {"rl.kl_coef": 0.001})
    policy, ids = LatentPolicy(bench.model()), bench.tokens()
    own = _only(policy, policy.trained)
    masters = [torch.nn.Parameter(one.detach().float()) for one in own]
    adam = torch.optim.AdamW(masters, lr=5e-7)
    zero = torch.zeros(ids.shape, device=bench.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, -1] = False
    padded = torch.ones_like(ids)
    padded[0, -1] = 0  # so that attention gets a mask, as with answers of different lengths
    actions = ids % bench.size.shape["num_actions"]
    batch = MicroBatch(ids, padded, actions, mask, mask, zero - 4, zero + 1, zero, zero, mask)

    def micro_batch() -> None:
        logits, frozen = forward(policy, batch, Frozen())
        loss, _ = policy_objective(
            logits, batch, frozen, Advantages(batch.advantages), None, rl=config.rl, kl_coef=0.001, temperature=1.0,
            top_k=0,
        )  # fmt: skip
        (loss / mask.sum()).backward()

    def step() -> None:
        for _ in range(2):
            micro_batch()
        for master, one in zip(masters, own, strict=True):
            master.grad, one.grad = one.grad.float(), None  # type: ignore[union-attr]
        adam.step()
        for master, one in zip(masters, own, strict=True):
            one.data.copy_(master)
            master.grad = None

    step()
    work = learning(config, bench.sizes(), Rows(ids.numel(), ids.shape[1], float(mask.sum())))
    yield bench.of_flops("a micro-batch", bench.seconds(micro_batch), work.look + work.forward + work.backward)
    yield from _peak(bench, work, micro_batch)
    yield Figure("a step of two micro-batches", bench.seconds(step) * 1e3, "ms")


def _only(module: torch.nn.Module, trained: tuple[str, ...]) -> list[Any]:
    """Freeze all but the trained parameters; returns these."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _peak(bench: Bench, work: Any, micro_batch: Callable[[], object]) -> Iterator[Figure]:
    """Peak memory of a micro-batch when Adam's state exists, against the plan without ZeRO's buffers."""
    peak = bench.peak(micro_batch)
    if peak is None:
        return
    plan = 2 * (work.frozen + work.trained) + 14 * work.trained + work.kept + work.temporary
    yield Figure("peak memory", peak / 1e9, "GB", f"the plan, {plan / 1e9:.1f} GB", peak / plan)


def vocabulary(bench: Bench) -> Iterator[Figure]:
    """The loss over a vocabulary from given logits, piece by piece."""
    from cola_ray.learner.pieces import AT_ONCE, cross_entropies

    rows, columns = bench.size.rows * bench.size.tokens, bench.size.shape["vocab_size"]
    logits = torch.randn(rows, columns, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.arange(rows, device=bench.device) % columns

    def loss() -> None:
        logits.grad = None
        cross_entropies(logits, targets).backward()

    # Logits are read for the loss and again for the gradient, whose pieces are written and then joined.
    yield bench.of_bytes(f"cross-entropy of {rows} x {columns}", bench.seconds(loss), 5 * 2.0 * rows * columns)
    peak = bench.peak(loss)
    if peak is not None:
        plan = 3 * 2.0 * rows * columns + 20 * min(rows * columns, AT_ONCE)
        yield Figure("its peak memory", peak / 1e9, "GB", f"the plan, {plan / 1e9:.1f} GB", peak / plan)
    with torch.no_grad():
        ours = float(cross_entropies(logits[:64], targets[:64]))
        wanted = float(torch.nn.functional.cross_entropy(logits[:64].double(), targets[:64], reduction="sum"))
    yield Figure("its relative error against float64", abs(ours / wanted - 1), "")


def pretraining(bench: Bench) -> Iterator[Figure]:
    """A micro-batch of the stage `actions`: IDM, codebook and world model train on the vocabulary's loss."""
    from cola_ray.learner.stage_module import TRAINED, StageModule
    from cola_ray.settings.presets import preset
    from cola_ray.studies.planned_work import Rows, pretraining

    module, ids = StageModule(bench.model(), "actions", preset("llama-3.1-8b")), bench.tokens()
    own = _only(module, TRAINED["actions"])
    adam = [torch.zeros(3, one.numel(), device=bench.device) for one in own]  # as large as Adam's state
    positions = torch.arange(ids.shape[1], device=bench.device).expand_as(ids) % (ids.shape[1] // 2)  # two documents
    given = (ids, positions, torch.ones_like(ids, dtype=torch.bool), torch.arange(len(ids), device=bench.device))

    def micro_batch() -> None:
        loss, _ = module(*given, False)
        (loss / ids.numel()).backward()

    work = pretraining("actions", bench.sizes(), Rows(ids.numel(), ids.shape[1], ids.numel() - len(ids)))
    yield bench.of_flops("a micro-batch", bench.seconds(micro_batch), work.look + work.forward + work.backward)
    yield from _peak(bench, work, micro_batch)
    del adam


def critic(bench: Bench) -> Iterator[Figure]:
    """ArCHer's twin heads on features of the base: a step's loss on the device against the CPU's."""
    from cola_ray.algorithms.archer import TwinHeads
    from cola_ray.replay.critic import Critic, CriticBatch

    width, rows = bench.size.shape["hidden_size"] + 1, 256
    draw = torch.Generator().manual_seed(2)
    features = [torch.randn(rows, width, generator=draw) for _ in range(5)]
    rewards, ended = torch.rand(rows, generator=draw), torch.arange(rows) % 5 == 0
    losses = []
    for device in (torch.device("cpu"), bench.device):
        torch.manual_seed(3)
        learner = Critic(TwinHeads(width, width).to(device), gamma=0.95, tau=0.1, lr=3e-4, grad_clip=1.0)
        states, said, then, fresh, fresh_said = (one.to(device) for one in features)
        batch = CriticBatch(states, said, then, rewards.to(device), ended.to(device), fresh, fresh_said)
        losses.append(learner.step(batch)["critic/loss"])
    yield Figure("relative difference of the first loss", abs(losses[1] / losses[0] - 1), "")
    parameters = sum(one.numel() for one in learner.online.parameters())
    # Weights, gradients, two moments and the target, as read and written by Adam and Polyak averaging.
    yield bench.of_bytes(f"a step of {rows} turns", bench.seconds(lambda: learner.step(batch)), 36.0 * parameters)


def host_copy(bench: Bench) -> Iterator[Figure]:
    """The first rank's work to publish weights: copy them to the host, hash them, pack buckets."""
    import xxhash

    from cola_ray.weights import WeightReceiver, WeightSender

    wide, inner = bench.size.shape["hidden_size"], bench.size.shape["intermediate_size"]
    shapes = [(wide, wide)] * 2 + [(inner, wide)] * 3
    tensors = [(str(i), torch.randn(*shape, device=bench.device).to(torch.bfloat16)) for i, shape in enumerate(shapes)]
    moved = sum(tensor.nbytes for _, tensor in tensors) / 1e9
    took = bench.seconds(lambda: [tensor.cpu() for _, tensor in tensors])
    yield Figure("copy to the host", moved / took, "GB/s")
    if bench.device.type == "cuda":
        pinned = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for _, tensor in tensors]
        took = bench.seconds(lambda: [to.copy_(tensor) for to, (_, tensor) in zip(pinned, tensors, strict=True)])
        yield Figure("copy to memory of the host that is pinned and there already", moved / took, "GB/s")
    held = [tensor.cpu().view(torch.uint8).numpy() for _, tensor in tensors]
    took = bench.seconds(lambda: [xxhash.xxh3_64_intdigest(one.data) for one in held])
    yield Figure("hash", moved / took, "GB/s")
    took = bench.seconds(lambda: list(WeightSender().buckets(1, tensors)))
    yield Figure("buckets, both together", moved / took, "GB/s", "2.5 GB/s, what the plan expects", moved / took / 2.5)
    receiver = WeightReceiver(1)
    for bucket in WeightSender().buckets(1, tensors):
        receiver.add(bucket)
    there = dict(receiver.finish([name for name, _ in tensors]))
    changed = sum(not torch.equal(there[name], tensor.cpu()) for name, tensor in tensors)
    yield Figure("tensors that arrive changed", float(changed), "")


# --- part 2: DeepSpeed ------------------------------------------------------------------------------------------------


def zero(bench: Bench) -> Iterator[Figure]:
    """The learner's own step in ZeRO-3 with one rank, and the publication of its weights."""
    from run import random_batch

    from cola_ray.learner.policies import LatentPolicy
    from cola_ray.learner.rl import RLLearner
    from cola_ray.settings.config import override
    from cola_ray.settings.presets import preset
    from cola_ray.studies.planned_memory import learner_memory
    from cola_ray.studies.planned_work import Rows, learning

    on_gpu, width = bench.device.type == "cuda", bench.size.tokens
    ranks.join("nccl" if on_gpu else "gloo")
    tokens = bench.size.rows * width
    config = override(preset("llama-3.1-8b"), {
        "cluster.use_gpu": on_gpu, "cluster.learner_ranks": 1, "rl.micro_batch_tokens": tokens,
        "rollout.max_prompt_tokens": width // 8, "rollout.max_new_tokens": width - width // 8,
    })  # fmt: skip
    learner = RLLearner(config, LatentPolicy(bench.model()))
    shape = bench.size.shape
    batch = random_batch(
        width // 8, width - width // 8, 2 * bench.size.rows, shape["vocab_size"], tokens, shape["num_actions"]
    )
    learner.step(batch)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        learner.step(batch)
        bench.wait()
        times.append(time.perf_counter() - started)
    m = bench.sizes()
    work = learning(config, m, Rows(2 * tokens, width, 2.0 * tokens * 7 / 8))
    flops = work.look + work.forward + work.backward
    yield bench.of_flops("a step of two micro-batches", statistics.median(times), flops)
    peak = bench.peak(lambda: learner.step(batch))
    if peak is not None:
        plan = sum(learner_memory(config, m).values())
        yield Figure("peak memory", peak / 1e9, "GB", f"the plan, {plan / 1e9:.1f} GB", peak / plan)
    sent = sum(bucket.payload[i].nbytes for bucket in learner.buckets() for i in range(len(bucket.names)))
    took = bench.seconds(learner.buckets, repeats=3)
    yield Figure("weights, gathered and in buckets", sent / 1e9 / took, "GB/s", f"{sent / 1e9:.3g} GB in {took:.2f} s")
    learner.zero.close()
    torch.distributed.destroy_process_group()
