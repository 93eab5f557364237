"""The simulation of benchmarks/scale.py against derivations of its own, and the plan's idle shares against both."""

import asyncio
import sys

import numpy as np
import pytest
from runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import scale
from simulated_cluster import SimulatedEngine, SimulatedTime

from cola_ray.settings.config import override
from cola_ray.settings.presets import preset
from cola_ray.studies import planned_time
from cola_ray.studies.planned_idle import Lengths, idle
from cola_ray.studies.planned_time import Decoding
from cola_ray.studies.planned_work import sizes

H100 = planned_time.GPUS["h100"]


@pytest.fixture(scope="module")
def llama():
    return sizes(preset("llama-3.1-8b"))


def simulated(work):
    loop = SimulatedTime()
    try:
        return loop.run_until_complete(work(loop))
    finally:
        loop.close()


def test_simulated_hours_pass_at_once_and_in_order():
    async def work(loop):
        async def after(seconds):
            await asyncio.sleep(seconds)
            return loop.time()

        return await asyncio.gather(after(7200.0), after(0.5), after(0.0))

    assert simulated(work) == pytest.approx([7200.0, 0.5, 0.0])


def test_a_simulation_in_which_everybody_waits_ends():
    async def work(loop):
        await loop.create_future()

    with pytest.raises(RuntimeError, match="nothing will ever happen"):
        simulated(work)


def by_single_steps(calls, decoding):
    """When calls end, one decoding step after the other; those that arrive during a step join after it.

    Args:
        calls: (second of arrival, lengths), in order.
    """
    waiting, running, queue, now, ended = list(enumerate(calls)), [], [], 0.0, {}
    while waiting or running or queue:
        while waiting and waiting[0][1][0] <= now + 1e-9:
            number, (_, lengths) = waiting.pop(0)
            queue += [[length, number] for length in lengths]
        while queue and len(running) < int(decoding.most):
            running.append(queue.pop(0))
        if not running:
            now = waiting[0][1][0]
            continue
        now += decoding.seconds(len(running))
        for one in running:
            one[0] -= 1
            if not one[0]:
                ended[one[1]] = now
        running = [one for one in running if one[0]]
    return [ended[number] for number in range(len(calls))]


@pytest.mark.parametrize("most", [3, 64])
def test_an_engine_decodes_as_step_after_step_would(most):
    decoding = Decoding(weights=0.01, cache=0.001, compute=0.0002, prefill=0.0, sequences=8, most=most)
    draw = np.random.default_rng(0)
    # Arrivals at ends of steps, for a call that arrives within one is computed from there on in the simulation.
    calls = [(0.0, draw.integers(1, 60, 8).tolist()), (0.0, draw.integers(1, 60, 5).tolist()), (9.0, [1, 1, 40])]

    async def work(loop):
        engine = SimulatedEngine(loop, decoding, 0.0)

        async def ends(arrival, lengths):
            await asyncio.sleep(arrival)
            await engine.decode(lengths, 0.0)
            return loop.time()

        return await asyncio.gather(*(ends(*call) for call in calls)), engine.worked()

    ended, worked = simulated(work)
    expected = by_single_steps(calls, decoding)
    assert ended == pytest.approx(expected, abs=1e-6)
    assert worked == pytest.approx(max(expected[:2]) + expected[2] - 9.0, abs=1e-6)


def test_lengths_have_the_mean_that_they_are_given_and_the_plans_distribution():
    lengths = Lengths(mean=300.0, spread=0.9, limit=512)
    drawn = lengths.draw(np.random.default_rng(0), (200_000,))
    assert (drawn.min(), drawn.max()) == (1, 512) or (drawn.min() > 1 and drawn.max() == 512)
    assert drawn.mean() == pytest.approx(300, rel=0.005)
    for tokens in (0, 50, 300, 511):
        assert (drawn > tokens).mean() == pytest.approx(lengths.longer[tokens], abs=0.005)
    assert set(Lengths(300.0, 0.0, 512).draw(np.random.default_rng(0), (9,))) == {300}
    assert set(Lengths(512.0, 0.9, 512).draw(np.random.default_rng(0), (9,))) == {512}


def test_idle_shares_of_equal_lengths_by_hand(llama):
    """One after the other, without a spread: engines wait for the learner alone, and the learner for them."""
    config = override(preset("llama-3.1-8b"), {"hardware.response_spread": 0.0})
    planned, (hands_over, loads) = planned_time.step_time(config, llama, H100), planned_time.update(config, llama)
    found = idle(config, llama, H100)
    assert found.step == pytest.approx(planned.total(False), rel=1e-3)
    assert found.engines == pytest.approx((planned.learn + hands_over) / found.step, rel=1e-3)
    assert found.learner == pytest.approx((planned.rollout + loads) / found.step, rel=1e-3)
    beside = override(config, {"rl.max_staleness": 1})
    assert idle(beside, llama, H100).step == pytest.approx(planned.rollout + loads, rel=1e-3), "drains, then loads"
    spread = idle(override(config, {"hardware.response_spread": 1.0}), llama, H100)
    assert spread.step > 1.2 * found.step


@pytest.mark.parametrize(("mode", "late"), [("drain", 0), ("drain", 1), ("continue", 1), ("continue", 4)])
def test_the_plans_idle_shares_are_those_of_a_simulation(llama, mode, late):
    args = scale.parsed(["--hours-between-losses", "0"])
    config = scale.settings(8, 4 * late + 10, late, mode)
    run, planned = scale.simulate(config, scale.cluster_of(config, llama, args)), idle(config, llama, H100)
    assert run.step == pytest.approx(planned.step, rel=scale.BOUNDS["step"])
    assert run.engines_idle == pytest.approx(planned.engines, abs=scale.BOUNDS["engines"])
    assert run.learner_idle == pytest.approx(planned.learner, abs=scale.BOUNDS["learner"])


def test_lost_engines_are_started_again_and_all_steps_are_made(llama):
    args = scale.parsed(["--hours-between-losses", "0.1", "--restart-seconds", "30"])
    config = scale.settings(8, 12, 1, "continue")
    run = scale.simulate(config, scale.cluster_of(config, llama, args))
    again = scale.simulate(config, scale.cluster_of(config, llama, args))
    assert run.losses > 0
    assert run.regenerated > 0
    assert (run.step, run.losses, run.regenerated) == (again.step, again.losses, again.regenerated), "seeded"
    unharmed = scale.simulate(config, scale.cluster_of(config, llama, scale.parsed(["--hours-between-losses", "0"])))
    assert run.step > unharmed.step


def test_costs_of_sizes_are_counted(llama):
    args = scale.parsed(["--gpus", "8", "16", "--steps", "6"])
    rows = scale.of_sizes(llama, args)
    small, large = rows["8 GPUs"], rows["16 GPUs"]
    assert (small["completions a step"], large["completions a step"]) == (256, 512)
    for row in (small, large):
        assert row["loop s"] > 0
        assert row["batches s"] > 0
        # Of a completion's 1024 tokens nothing passes: records come in, references and what ranks need of them go out.
        assert 50 < row["GB in a step"] * 1e9 / row["completions a step"] < 500
        assert 50 < row["GB out a step"] * 1e9 / row["completions a step"] < 500
    assert large["calls a step"] == pytest.approx(2 * small["calls a step"], rel=0.1)
