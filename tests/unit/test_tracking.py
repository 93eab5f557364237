"""Tables and plots of figures: nothing is cut off, and a figure without an interval is still drawn."""

import pytest

from cola_ray.runs.figures import plot_against_tokens, print_comparison

WAYS = ("base", "greedy", "sample", "beam", "mcts", "mcts_q")
FIGURES = {
    "problems": 64.0,
    "weighted_majority": 0.8125,
    "weighted_majority_low": 0.76,
    "weighted_majority_high": 0.854,
}


def test_a_table_in_a_log_has_every_digit(capsys):
    print_comparison("held out", dict.fromkeys(WAYS, FIGURES) | {"low": {"yield_low": 0.25}})
    said = capsys.readouterr().out
    assert said.count("0.812 (0.76..0.854)") == len(WAYS)
    assert "weighted_majority " in said
    assert "…" not in said
    assert "yield_low" in said, "no end of another figure's interval"
    assert "weighted_majority_low" not in said


@pytest.mark.filterwarnings("error")
def test_a_figure_of_one_problem_is_drawn_without_an_interval(tmp_path):
    found = {"base": {"generated_tokens": 0.0, "reward": 0.0}, "greedy": {"generated_tokens": 3.0, "reward": 0.3}}
    found |= {"sample": FIGURES | {"generated_tokens": 9.0}}
    plot_against_tokens(tmp_path / "plot.png", found, ("reward", "weighted_majority"))
    assert (tmp_path / "plot.png").stat().st_size > 1000
