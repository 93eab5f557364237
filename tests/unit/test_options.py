"""benchmarks/options.py: what it compares, in which order, and what it says of the rounds."""

import itertools
import json
import sys
from collections import Counter

import pytest
from runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import options
from uncertainty import in_words, median_interval

from cola_ray import registry
from cola_ray.settings.config import RLConfig
from cola_ray.settings.relevance import unread


def config_of(settings, on_gpu=False):
    return options.settings_of(options.complete(settings, on_gpu))


def test_every_option_can_be_measured_here_or_on_a_gpu():
    on_gpu_alone = [name for name, option in options.options().items() if options.refusals(option, False)]
    assert sorted(on_gpu_alone) == ["offload_frozen", "offload_optimizer"]
    for name, option in options.options().items():
        on_gpu = name in on_gpu_alone
        assert not options.refusals(option, on_gpu), name
        assert not unread(config_of(option.settings, on_gpu), "rl_math"), name
        assert not options.refused(config_of(option.against, on_gpu)), name


def test_an_option_differs_from_what_it_is_compared_with_and_the_control_does_not():
    for name, option in options.options().items():
        same = config_of(option.settings) == config_of(option.against)
        assert same == (name in options.CONTROLS), name
        assert {*option.against} <= {*option.settings}, f"{name} drops what it needs"
    assert tuple(options.options())[: len(options.CONTROLS)] == options.CONTROLS, "they come first"
    by_name = {}
    for option in options.options().values():
        assert by_name.setdefault(option.named, option.against) == option.against
    assert by_name["default"] == {}


def test_modes_losses_and_algorithms_are_all_there():
    known = options.options()
    values = [option.settings.get("rl.importance_mode") for option in known.values()]
    every = options.get_args(RLConfig.model_fields["importance_mode"].annotation)
    assert {*every} - {*values} == {RLConfig().importance_mode}
    assert {f"loss {name}" for name in registry.names("loss")} - {*known} == {"loss ppo"}, "the default"
    assert {"ppo", "etpo", "remax", "rloo", "reinforce"} <= {*known}
    files = [options.kept(ROOT, name).name for name in known]
    assert len({*files}) == len(files), "each keeps its own rounds"


class Clock:
    """A process whose steps take what it is told."""

    def __init__(self, name, order, seconds):
        self.name, self.order, self.seconds = name, order, iter(seconds)

    def step(self):
        self.order.append(self.name)
        seconds = next(self.seconds)
        return {"step": seconds, "rollout": seconds / 2, "learn": seconds / 4, "memory": seconds * 2**20}


def test_rounds_are_pairs_in_turns_after_a_warm_up():
    order, count = [], 6
    steps = range(count + options.WARM_UP)
    found = options.rounds_of(Clock("without", order, [100.0 + i for i in steps]),
                              Clock("with", order, [200.0 + i for i in steps]), count)  # fmt: skip
    assert [(a["step"], b["step"]) for a, b in found] == [(102.0 + i, 202.0 + i) for i in range(count)]
    assert [{*order[i : i + 2]} for i in range(0, len(order), 2)] == [{"without", "with"}] * len(steps)
    assert Counter(order[::2]) == {"without": len(steps) // 2, "with": len(steps) // 2}, "each is first equally often"


def rounds(pairs):
    return [tuple({"step": s, "rollout": s, "learn": s, "memory": m * 2**20} for s, m in pair) for pair in pairs]


def test_a_row_of_rounds_by_hand():
    slower = options.row_of(rounds([((1.0, 500), (1.5 + i / 100, 510)) for i in range(15)]), "default")
    assert slower["time"] == pytest.approx(1.57)
    assert (slower["says"], slower["more_mb"], slower["and"]) == ("more time", 10.0, "more memory")
    assert slower["time_low"] > 1.5
    same = options.row_of(rounds([((1.0, 500), (1.0 + (-1) ** i / 10, 500)) for i in range(15)]), "default")
    assert (same["says"], same["and"]) == ("within noise", "within noise")
    shared = options.row_of(rounds([((s, 1), (2 * s, 1)) for s in (1, 5, 1, 9, 2, 7, 1, 1, 1, 3)]), "default")
    assert (shared["time_low"], shared["time"], shared["time_high"]) == (2.0, 2.0, 2.0), "what both feel falls out"
    few = options.row_of(rounds([((1.0, 1), (2.0, 1))] * 7), "default")
    assert (few["says"], few["time_low"]) == ("too few rounds", None)
    json.dumps(few, allow_nan=False)


@pytest.mark.parametrize(("count", "confidence"), [(6, 0.95), (8, 0.99), (11, 0.95), (13, 0.99)])
def test_the_interval_of_a_median_holds_it_as_often_as_it_says(count, confidence):
    """By trying all: each value is below or above the median by a coin. The next narrower interval is too narrow."""
    covered, narrower = 0, 0
    for sides in itertools.product((-1, 1), repeat=count):
        values = [side * (place + 1.0) for place, side in enumerate(sides)]  # around a median of 0
        low, high = median_interval(values, confidence)
        covered += low < 0 < high
        ordered = sorted(values)
        place = ordered.index(low) + 1
        narrower += ordered[place] < 0 < ordered[-1 - place]
    assert covered / 2**count >= confidence > narrower / 2**count


def test_too_few_values_have_no_interval():
    assert median_interval([1.0] * 7, 0.99) is None
    assert median_interval([1.0] * 8, 0.99) == (1.0, 1.0)
    assert median_interval([], 0.99) is None


def test_words():
    assert in_words((1.1, 1.2), 1.0, "time") == "more time"
    assert in_words((0.8, 0.9), 1.0, "time") == "less time"
    assert in_words((0.9, 1.1), 1.0, "time") == "within noise"
    assert in_words((1.0, 1.1), 1.0, "time") == "within noise"


def test_a_difference_must_exceed_that_of_two_equal_processes():
    controls = [rounds([((1.0, 500), (1.0 + apart, 500 + mb))] * 9) for apart, mb in ((0.02, -18), (-0.05, 3))]
    margins = options.margins_of(controls)
    assert margins == pytest.approx((0.05, 18.0))
    for apart, mb, says, more in ((0.04, 17, "within noise", "within noise"), (0.06, 19, "more time", "more memory"),
                                  (-0.06, -19, "less time", "less memory")):  # fmt: skip
        row = options.row_of(rounds([((1.0, 500), (1.0 + apart, 500 + mb))] * 9), "default", margins)
        assert (row["says"], row["and"]) == (says, more)
    assert options.margins_of([]) == (0, 0)


def test_rounds_that_were_kept_are_not_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(options, "stepped", lambda *_: pytest.fail("a process was started"))
    known = options.options()
    chosen = {name: known[name] for name in ("top_p 0.9", "etpo")}
    made = rounds([((1.0, 500), (1.5, 510))] * 8)
    for name in chosen:
        options.kept(tmp_path, name).parent.mkdir(exist_ok=True)
        options.kept(tmp_path, name).write_text(json.dumps(made))
    found = options.measured(tmp_path, tmp_path, chosen, 8, on_gpu=False)
    assert list(found) == list(chosen)
    assert options.row_of(found["etpo"], "default")["time"] == 1.5
    assert capsys.readouterr().out == "0 of 2 options to measure, 8 rounds each\n"
