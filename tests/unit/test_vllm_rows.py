"""Which request owns which row: V1's and V2's bookkeeping over their own classes, and the table that keeps actions."""

import types

import numpy as np
import pytest
import torch

from cola_ray.model.action_requests import LOWEST_LOG_PROB, ActionRequest, sampling_args
from cola_ray.model.modeling_cola import FEW_ACTIONS, RANKED, CoLAConfig, held_or_new, sample_actions

CPU = torch.device("cpu")
SLOTS, STEPS, ACTIONS = 8, 40, 12


def config(name, processors=(), rank=0, every=1, is_async=False):
    """What the tables read of vLLM's configuration."""
    parts = types.SimpleNamespace
    return parts(
        instance_id=name,
        model_config=parts(
            max_model_len=STEPS,
            logits_processors=list(processors),
            enable_prompt_embeds=False,
            hf_config=CoLAConfig(action_every=every),
        ),
        scheduler_config=parts(max_num_seqs=SLOTS, max_num_batched_tokens=64, async_scheduling=is_async),
        parallel_config=parts(data_parallel_rank=rank),
    )


@pytest.fixture
def table():
    from cola_ray.model.vllm_rows import RowTable

    yield RowTable.of(config("a test"))
    RowTable.forget("a test")


def requests(count):
    """Mixed settings, as vLLM's SamplingParams carry them."""
    from vllm.sampling_params import SamplingParams

    return [
        SamplingParams(
            **sampling_args(
                temperature=[1.0, 0.0, 0.7][i % 3], top_k=[0, 3][i % 2],
                top_p=[1.0, 1.0, 0.6, 0.9, 1.0][i % 5], seed=100 + i,
                actions=[4, -1, RANKED - 1][: i % 4], slot=(i * 5) % 121,
            )
        )
        for i in range(count)
    ]  # fmt: skip


def expected(params, prompt_length, step, logits):
    """The draw of one request at one step, alone."""
    one = ActionRequest.from_params(params.extra_args, params.seed)
    forced = one.forced[step] if step < len(one.forced) else -1
    whole = [torch.tensor([value]) for value in (one.top_k, one.seed, prompt_length - 1 + step, forced)]
    shares = torch.tensor([one.temperature]), torch.tensor([one.top_p])
    return [column[0] for column in sample_actions(logits[None], shares[0], *whole, shares[1])]


def check_draws(table, owners, logits):
    """``owners``: (params, prompt length, step) of each row."""
    actions, _ = table.draw(logits)
    for row, (params, prompt_length, step) in enumerate(owners):
        action, log_prob = expected(params, prompt_length, step, logits[row])
        assert actions[row] == action
        kept = table.kept.read([params.extra_args["action_slot"]], STEPS)[0, step]
        assert kept[0] == action
        assert kept[1:].view(np.float32)[0] == max(float(log_prob), LOWEST_LOG_PROB)


def test_v1_batches_that_grow_shrink_and_are_reordered(table):
    """Against a list that vLLM's own input batch would keep: requests come, end, move and swap."""
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from cola_ray.model.vllm_rows import RowTracker

    tracker, draw = RowTracker(config("a test"), CPU, False), np.random.default_rng(0)
    waiting, batch = [(params, 2 + i % 5) for i, params in enumerate(requests(24))], []
    for turn in range(60):
        removed, added, moved = [], [], []
        if batch and turn % 3 == 2:  # one ends; the last row takes its place
            gone = int(draw.integers(len(batch)))
            removed.append(gone)
            last = batch.pop()
            if gone < len(batch):
                batch[gone] = last
                moved.append((len(batch), gone, MoveDirectionality.UNIDIRECTIONAL))
        elif waiting and len(batch) < SLOTS:
            params, length = waiting.pop(0)
            added.append((len(batch), params, list(range(length)), output := []))
            batch.append((params, length, output))
        elif len(batch) > 1:
            first, second = sorted(draw.choice(len(batch), 2, replace=False).tolist())
            batch[first], batch[second] = batch[second], batch[first]
            moved.append((first, second, MoveDirectionality.SWAP))
        changed = removed or added or moved
        tracker.update_state(BatchUpdate(len(batch), removed, added, moved) if changed else None)
        if batch:
            logits = torch.from_numpy(draw.normal(size=(len(batch), ACTIONS)).astype(np.float32))
            check_draws(table, [(params, length, len(output)) for params, length, output in batch], logits)
        for _, _, output in batch:
            if len(output) < STEPS - 8:
                output.append(-1)  # under asynchronous scheduling a token is a placeholder when its row is needed


def test_rows_of_a_profiling_run_are_greedy_and_kept_nowhere(table):
    logits = torch.randn(5, ACTIONS, generator=torch.Generator().manual_seed(0))
    actions, rows = table.draw(logits)
    assert torch.equal(actions, logits.argmax(-1))
    assert rows.slot is None
    assert table.kept.table is None


@pytest.mark.parametrize("num_actions", [ACTIONS, 2 * FEW_ACTIONS])
def test_a_step_asks_the_device_for_nothing(table, num_actions, monkeypatch):
    """On the meta device there is nothing to read: a wait for a value, or a shape that depends on one, is an error."""
    from vllm.v1.sample.logits_processor import BatchUpdate

    from cola_ray.model import vllm_rows, vllm_slots
    from cola_ray.model.vllm_rows import RowTracker
    from cola_ray.model.vllm_slots import SlotSettings

    def to_device(data, device, dtype=None):  # once vLLM has served on a CPU in this process, its own leaves all there
        return torch.as_tensor(data, dtype=dtype).to(device)

    for module in (vllm_rows, vllm_slots):
        monkeypatch.setattr(module, "async_tensor_h2d", to_device)
    meta = torch.device("meta")
    tracker, slots = RowTracker(config("a test"), meta, False), SlotSettings(table, SLOTS, meta)
    mixed = requests(6)
    mixed[0].extra_args["action_held"] = 3
    tracker.update_state(BatchUpdate(6, [], [(row, one, [1, 2], [5]) for row, one in enumerate(mixed)], []))
    logits = torch.empty(6, num_actions, device=meta)
    actions, rows = table.draw(logits, logits)
    assert actions.shape == (6,)
    assert None not in rows, "all settings are in use"
    for slot, one in enumerate(mixed):
        slots.add_request(slot, ActionRequest.from_params(one.extra_args, one.seed), 2, 2)
    at = torch.zeros(6, dtype=torch.int64, device=meta)
    table.prepared = slots.rows(at, np.arange(6), at)
    assert None not in table.prepared
    assert table.draw(logits, logits)[0].shape == (6,)


def test_the_table_of_actions_grows_and_keeps_what_it_has():
    from cola_ray.model.vllm_rows import ActionTable

    table = ActionTable(STEPS)
    table.reserve(0, CPU)
    table.write(torch.tensor([0, -1]), torch.tensor([3, 3]), torch.tensor([9, 1]), torch.tensor([-0.25, -1.0]))
    held = len(table.table)
    table.reserve(held + 5, CPU)
    assert len(table.table) > held + 5
    kept = table.read([0, held - 1], 4)
    assert kept.shape == (2, 4, 2)
    assert kept[0, 3, 0] == 9
    assert kept[0, 3, 1:].view(np.float32)[0] == -0.25
    assert not kept[1].any(), "what was written for nobody is nobody's"


def v2_batch(slots, prefixes):
    """V2's own input batch for requests in these slots, whose last tokens have these positions."""
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

    batch = InputBatch.make_dummy(len(slots), len(slots), InputBuffers(SLOTS, 64, CPU))
    batch.idx_mapping_np = np.array(slots, np.intp)
    batch.idx_mapping = batch.expanded_idx_mapping = torch.tensor(slots)
    batch.positions.copy_(torch.tensor(prefixes))
    return batch


def new_request(params, prompt, generated=()):
    from vllm.v1.core.sched.output import NewRequestData

    return NewRequestData(
        req_id="r", prompt_token_ids=prompt, mm_features=[], sampling_params=params, pooling_params=None,
        block_ids=([],), num_computed_tokens=0, lora_request=None, prefill_token_ids=[*prompt, *generated],
    )  # fmt: skip


@pytest.fixture
def state(table, monkeypatch):
    """CoLAModelState over V2's base class, without what that builds for rotary positions and images."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    from cola_ray.model.vllm_slots import CoLAModelState

    def built(self, vllm_config, model, encoder_cache, device):
        self.max_num_reqs, self.device, self.model = vllm_config.scheduler_config.max_num_seqs, device, model
        self.rope_state = self.prompt_embeds_state = None
        self.supports_mm_inputs = False

    monkeypatch.setattr(DefaultModelState, "__init__", built)
    return lambda *processors: CoLAModelState(config("a test", processors), None, None, CPU)


def test_v2_slots_are_reused_and_rows_come_in_any_order(table, state):
    """Requests come and go in V2's slots; forced actions of one that has gone do not reach its successor."""
    made, draw = state(), np.random.default_rng(1)
    params, held = requests(40), {}
    for turn in range(40):
        slot = int(draw.integers(SLOTS))
        prompt = list(range(2 + turn % 5))
        generated = turn % 3  # so many tokens were generated before a preemption
        made.add_request(slot, new_request(params[turn], prompt, range(generated)))
        held[slot] = [params[turn], len(prompt), generated]
        slots = draw.permutation(sorted(held)).tolist()
        owners = [tuple(held[one]) for one in slots]
        assert made.prepare_inputs(v2_batch(slots, [length - 1 + step for _, length, step in owners]), None) == {}
        logits = torch.from_numpy(draw.normal(size=(len(slots), ACTIONS)).astype(np.float32))
        check_draws(table, owners, logits)
        for one in held.values():
            one[2] = min(one[2] + 1, STEPS - 8)


def test_v2_profiling_runs_come_before_any_request_and_draw_for_nobody(table, state):
    """They go through prepare_inputs, too, with slots that no request holds."""
    logits = torch.randn(5, ACTIONS, generator=torch.Generator().manual_seed(0))
    state().prepare_inputs(v2_batch([0, 1, 2, 3, 4], [0] * 5), None)
    actions, rows = table.draw(logits)
    assert torch.equal(actions, logits.argmax(-1))
    assert rows.slot is None
    assert table.kept.table is None


def test_v2_draws_within_a_prompt_are_nobodys(table, state):
    """A chunk of a prompt has a row of logits, too; what is drawn there must not reach the first action's place."""
    made, (params,) = state(), requests(1)
    made.add_request(3, new_request(params, list(range(10))))
    made.prepare_inputs(v2_batch([3], [9]), None)
    logits = torch.randn(1, ACTIONS, generator=torch.Generator().manual_seed(0))
    check_draws(table, [(params, 10, 0)], logits)
    before = table.kept.read([0], STEPS).copy()
    made.prepare_inputs(v2_batch([3], [4]), None)
    table.draw(-logits)
    assert np.array_equal(table.kept.read([0], STEPS), before)
    made.prepare_dummy_inputs(1, 1)
    assert table.draw(logits)[1].slot is None, "a profiling run draws for nobody"


def test_v2_served_requests_draw_by_their_own_settings(table, state):
    from vllm.sampling_params import SamplingParams

    from cola_ray.model.vllm_slots import SlotRequestSampler

    made = state("cola_ray.model.vllm_slots:SlotRequestSampler")
    params = SamplingParams(temperature=0.8, top_k=3, top_p=0.5, seed=5)
    made.add_request(0, new_request(params, [1, 2, 3]))
    made.prepare_inputs(v2_batch([0], [2]), None)
    logits = torch.randn(1, ACTIONS, generator=torch.Generator().manual_seed(0))
    actions, rows = table.draw(logits)
    seed = ActionRequest.from_params({}, 5).seed
    action, _ = sample_actions(
        logits, torch.tensor([0.8]), torch.tensor([3]), torch.tensor([seed]), torch.tensor([2]), None,
        torch.tensor([0.5]),
    )  # fmt: skip
    assert actions.tolist() == action.tolist()
    assert rows.slot is None, "a server hands out no actions"
    tokens = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    best = tokens.argmax(-1)
    left = SlotRequestSampler(None, None).apply(tokens, None)
    assert torch.equal(left.isfinite().nonzero()[:, 1], best)


def test_a_server_reads_the_actions_that_its_model_kept(table):
    """Though vLLM has renewed the instance id of the worker's configuration since the model was made."""
    from types import SimpleNamespace

    from cola_ray.model.vllm_rows import ServedActions

    class Worker(ServedActions):
        vllm_config = config("renewed")

        def get_model(self):
            return SimpleNamespace(rows=table)

    table.kept.reserve(1, CPU)
    written = torch.tensor([5]), torch.tensor([-0.5])
    table.kept.write(torch.tensor([1]), torch.tensor([0]), *written)
    assert Worker().served_actions([1], 1) == [([5], [-0.5])]


def test_ranks_of_a_server_draw_alike_and_replicas_do_not():
    """Each rank has a table of its own in a process of its own; a request without a seed must draw the same in all."""
    from vllm.sampling_params import SamplingParams

    from cola_ray.model.vllm_rows import RowTable, served_request

    def drawn(name, rank):
        table = RowTable(config(name, rank=rank))
        return [served_request(SamplingParams(temperature=1.0), table.seeds).seed for _ in range(4)]

    assert drawn("a server", 0) == drawn("a server", 0)
    assert len({*drawn("a server", 0), *drawn("a server", 1), *drawn("another", 0)}) == 12


def test_v2_samples_tokens_in_a_processor(table):
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

    from cola_ray.model.vllm_slots import SlotTokenSampler

    lengths = types.SimpleNamespace(np=np.arange(3, 3 + SLOTS))
    held = types.SimpleNamespace(max_num_reqs=SLOTS, device=CPU, prompt_len=lengths, prefill_len=lengths)
    sampler, params = SlotTokenSampler(config("a test"), held), requests(6)
    for slot, one in enumerate(params):
        assert sampler.add_request(slot, one)
    slots, step = [4, 1, 5, 0], 2
    context = LogitsContext(
        expanded_idx_mapping=torch.tensor(slots), idx_mapping=torch.tensor(slots), idx_mapping_np=np.array(slots),
        expanded_local_pos=torch.zeros(4), input_ids=torch.zeros(4), pos=torch.tensor(slots) + 2 + step,
        seq_lens_upper_bound_np=np.zeros(4),
    )  # fmt: skip
    logits = torch.randn(4, ACTIONS, generator=torch.Generator().manual_seed(2))
    left = sampler.apply(logits.clone(), context)
    for row, slot in enumerate(slots):
        token, log_prob = expected(params[slot], 3 + slot, step, logits[row])
        assert left[row].isfinite().nonzero()[:, 0].tolist() == [token]
        kept = table.kept.read([params[slot].extra_args["action_slot"]], STEPS)[0, step]
        assert kept[0] == token
        assert kept[1:].view(np.float32)[0] == max(float(log_prob), LOWEST_LOG_PROB)


def test_which_model_runner(monkeypatch):
    """V2 on GPUs, V1 on CPUs, and whichever the environment names; processors have the form of the runner."""
    import vllm.v1.sample.logits_processor as v1
    import vllm.v1.worker.gpu.sample.logits_processor as v2
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from cola_ray.model import vllm_rows

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "")  # so that it is put back, whatever sets it
    for named, on_gpu, chosen, base in (
        (None, False, "0", v1.LogitsProcessor), (None, True, "1", v2.LogitsProcessor),
        ("0", True, "0", v1.LogitsProcessor), ("1", False, "1", v2.LogitsProcessor),
    ):  # fmt: skip
        monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
        if named is not None:
            monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", named)
        monkeypatch.setattr(vllm_rows, "current_platform", types.SimpleNamespace(is_cuda_alike=lambda: on_gpu))  # noqa: B023
        vllm_rows.settle_vllm()
        assert vllm_rows.os.environ["VLLM_USE_V2_MODEL_RUNNER"] == chosen
        assert vllm_rows.os.environ["TRITON_F32_DEFAULT"] == "ieee", "its default for float32 is TF32"
        for use in ("tracker", "tokens", "served"):
            path = vllm_rows.processor(use)
            assert issubclass(resolve_obj_by_qualname(path.replace(":", ".")), base)


# --- actions that last ------------------------------------------------------------------------------------------------


def lasting(every, name="a test"):
    from cola_ray.model.vllm_rows import RowTable

    RowTable.forget("a test")
    return RowTable.of(config(name, every=every))


class Held:
    """What each request has chosen, by step: rows amid an action must take it, whatever their logits say."""

    def __init__(self, table, every):
        self.table, self.every, self.chosen = table, every, {}

    def check(self, owners, logits):
        """``owners``: (params, prompt length, step) of each row. Their draws, also of steps computed anew."""
        actions, _ = self.table.draw(logits)
        for row, (params, prompt_length, step) in enumerate(owners):
            if step % self.every == 0:
                action, log_prob = expected(params, prompt_length, step, logits[row])
                self.chosen[id(params), step] = action
            else:
                action, log_prob = self.chosen[id(params), step - step % self.every], 0.0
            assert actions[row] == action
            kept = self.table.kept.read([params.extra_args["action_slot"]], STEPS)[0, step]
            assert kept[0] == action
            assert kept[1:].view(np.float32)[0] == max(float(log_prob), LOWEST_LOG_PROB)

    def check_kept(self, params, steps):
        """The actions of the steps already taken are as they were."""
        kept = self.table.kept.read([params.extra_args["action_slot"]], STEPS)[0, :steps, 0]
        assert kept.tolist() == [self.chosen[id(params), step - step % self.every] for step in range(steps)]


@pytest.mark.parametrize("every", [2, 3])
def test_v1_holds_actions_through_preemptions_chunks_and_moves(every):
    """Requests leave the batch amid an action and come back in another row, with a chunk's draw before the real one."""
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from cola_ray.model.vllm_rows import RowTracker

    table, draw = lasting(every), np.random.default_rng(0)
    tracker, held = RowTracker(config("a test", every=every), CPU, False), Held(table, every)
    waiting, batch = [(params, 2 + i % 5, []) for i, params in enumerate(requests(14))], []
    preempted = 0

    def logits():
        return torch.from_numpy(draw.normal(size=(len(batch), ACTIONS)).astype(np.float32))

    for turn in range(90):
        removed, added, moved = [], [], []
        if len(batch) > 1 and turn % 3 == 2:  # one is preempted, or has come to its end
            gone = int(draw.integers(len(batch)))
            removed.append(gone)
            left, last = batch[gone], batch.pop()
            if gone < len(batch):
                batch[gone] = last
                moved.append((len(batch), gone, MoveDirectionality.UNIDIRECTIONAL))
            if len(left[2]) < STEPS - 8:
                waiting.insert(int(draw.integers(3)), (left[0], left[1], [*left[2]]))  # with a list of its own
                preempted += len(left[2]) % every != 0
        elif waiting and len(batch) < 5:
            params, length, output = waiting.pop(0)
            added.append((len(batch), params, list(range(length)), output))
            batch.append((params, length, output))
        elif len(batch) > 1:
            first, second = sorted(draw.choice(len(batch), 2, replace=False).tolist())
            batch[first], batch[second] = batch[second], batch[first]
            moved.append((first, second, MoveDirectionality.SWAP))
        tracker.update_state(BatchUpdate(len(batch), removed, added, moved) if removed or added or moved else None)
        if not batch:
            continue
        owners = [(params, length, len(output)) for params, length, output in batch]
        if turn % 4 == 0:
            table.draw(logits())  # a chunk that has not come to the last token: what is drawn is thrown away
        held.check(owners, logits())
        for _, _, output in batch:
            if len(output) < STEPS - 8:
                output.append(-1)
    assert preempted > 5, "requests were meant to be preempted amid an action"


@pytest.mark.parametrize("every", [2, 3])
def test_v2_holds_actions_through_preemptions_and_chunks(every, state):
    table, draw = lasting(every), np.random.default_rng(1)
    made, held = state(), Held(table, every)
    params, running = requests(20), {}  # slot of V2 -> [params, prompt length, steps taken]
    waiting = [[one, 2 + i % 5, 0] for i, one in enumerate(params)]
    for turn in range(80):
        if running and turn % 3 == 2:
            slot = sorted(running)[int(draw.integers(len(running)))]
            left = running.pop(slot)
            if left[2] < STEPS - 8:
                waiting.insert(int(draw.integers(3)), left)
        elif waiting and len(running) < SLOTS - 2:
            slot = [one for one in range(SLOTS) if one not in running][int(draw.integers(2))]
            running[slot] = one = waiting.pop(0)
            made.add_request(slot, new_request(one[0], list(range(one[1])), range(one[2])))
            known = one[1] + one[2]
            if known > 3:  # its tokens are read in two chunks; what is drawn after the first one is thrown away
                made.prepare_inputs(v2_batch([slot], [int(draw.integers(known - 1))]), None)
                table.draw(torch.randn(1, ACTIONS))
                held.check_kept(one[0], one[2])
        slots = draw.permutation(sorted(running)).tolist()
        if not slots:
            continue
        owners = [tuple(running[one]) for one in slots]
        made.prepare_inputs(v2_batch(slots, [length - 1 + step for _, length, step in owners]), None)
        held.check(owners, torch.from_numpy(draw.normal(size=(len(slots), ACTIONS)).astype(np.float32)))
        for one in running.values():
            one[2] = min(one[2] + 1, STEPS - 8)


def test_a_server_refuses_actions_that_last():
    from cola_ray.model.vllm_rows import ServedConfig

    served = config("a test", every=2).model_config
    with pytest.raises(ValueError, match="a server cannot hold them"):
        ServedConfig.verify_and_update_model_config(served)
    ServedConfig.verify_and_update_model_config(config("a test").model_config)


def test_the_action_of_the_step_before_may_go_on(table):
    """Learnt ends: the last action is in the table, or before the first step with the request; -1 is none."""
    from vllm.v1.sample.logits_processor import BatchUpdate

    from cola_ray.model.vllm_rows import RowTracker

    tracker, draw = RowTracker(config("a test"), CPU, False), np.random.default_rng(2)
    params = requests(3)
    params[1].extra_args |= {"action_held": 6}
    outputs = [[], [], []]
    added = [(row, params[row], [1, 2, 3], outputs[row]) for row in range(3)]
    tracker.update_state(BatchUpdate(3, [], added, []))
    held = [-1, 6, -1]
    for step in range(5):
        logits, ends = (torch.from_numpy(draw.normal(size=(3, ACTIONS)).astype(np.float32)) for _ in range(2))
        actions, _ = table.draw(logits, 3 * ends)
        for row in range(3):
            of_row = held_or_new(logits[row : row + 1], 3 * ends[row : row + 1], torch.tensor(held[row : row + 1]))[0]
            action, log_prob = expected(params[row], 3, step, of_row)
            assert actions[row] == action
            kept = table.kept.read([params[row].extra_args["action_slot"]], STEPS)[0, step]
            assert kept[1:].view(np.float32)[0] == max(float(log_prob), LOWEST_LOG_PROB)
            held[row] = int(action)
            outputs[row].append(-1)
