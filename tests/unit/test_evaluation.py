"""Evaluations kept as Parquet: what is answered is not asked again, and figures against hand-counted ones."""

import asyncio
import json
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cola_ray.learner.corpus import document
from cola_ray.loop.workers import WorkerLostError
from cola_ray.rollout.agent_worker import PlayedSeed
from cola_ray.rollout.evaluation_worker import AnsweredProblem
from cola_ray.settings.config import EvalConfig, override
from cola_ray.settings.presets import preset
from cola_ray.studies.evaluation import Evaluator, chunks, episode_figures, figures, remarks, write_answers
from cola_ray.tasks.verifiable import Gsm8k


def write(folder, way, first, rewards, answers, values=None, failures=None):
    file = folder / way / f"{first:06d}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        AnsweredProblem(
            first + i,
            "?",
            [0],
            said,
            [[1]] * len(said),
            [[2]] * len(said),
            chosen,
            scored,
            said,
            3,
            4,
            0.5,
            failures[i] if failures else [""] * len(said),
        )
        for i, (chosen, scored, said) in enumerate(zip(values or rewards, rewards, answers, strict=True))
    ]
    pq.write_table(pa.Table.from_pylist([{"way": way, **asdict(row)} for row in rows]), file)


def test_only_what_has_no_whole_file_is_asked(tmp_path):
    config = EvalConfig(ways=("greedy", "sample"), problems=5, chunk=2)
    write(tmp_path, "greedy", 0, [[1.0], [0.0]], [["1"], ["2"]])
    write(tmp_path, "greedy", 2, [[1.0]], [["1"]])  # cut short by another setting of problems
    left = [(way, indices) for way, indices, _ in chunks(config, 100, tmp_path)]
    assert left == [("greedy", [2, 3]), ("greedy", [4]), ("sample", [0, 1]), ("sample", [2, 3]), ("sample", [4])]
    assert [indices for way, indices, _ in chunks(config, 3, tmp_path) if way == "sample"] == [[0, 1], [2]]


def test_figures_by_hand(tmp_path):
    config = EvalConfig(ways=("sample",), ks=(1, 2, 8))
    rewards = [[0.0, 1.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.5]]
    answers = [["7", "4", "4"], ["3", "3", "5"], ["1", "2", "1"]]
    write(tmp_path, "sample", 0, rewards, answers)
    found = figures(config, tmp_path, seed=0)["sample"]
    assert found["problems"] == 3
    assert found["accuracy"] == 0, "of the first response"
    assert found["best"] == pytest.approx(2 / 3)
    assert found["majority"] == pytest.approx(1 / 3), "4 is right, 3 and 1 are not"
    assert found["pass_at_1"] == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    assert found["pass_at_2"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert "pass_at_8" not in found, "more than there are samples"
    assert found["best_low"] == pytest.approx(0.2077, abs=1e-4), "Wilson's of 2 of 3"
    assert found["best_high"] == pytest.approx(0.9385, abs=1e-4)
    assert (found["reward"], found["best_reward"]) == (0.0, pytest.approx((1 + 1 + 0.5) / 3))
    said, chosen = remarks(config, {"sample": found})
    assert said.startswith("pass@k of k = 8 is left out")
    assert chosen.startswith("best of sample: chosen by the verifier, which knows what is right (pass@n)")
    assert (found["generated_tokens"], found["computed_tokens"]) == (3, 4)


def test_sampled_answers_that_ended_are_kept_to_pre_train_on(tmp_path):
    conversation = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2 ="})
    rows = [{"prompt": list(conversation), "answer": "4"}, {"prompt": "3 + 3 =", "answer": "6"}]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows" / "test.jsonl").write_text(json.dumps({"prompt": "1 + 1 =", "answer": "2"}))
    task = {"task.name": "dataset", "task.path": str(tmp_path / "rows"), "eval.split": "train",
            "rollout.max_new_tokens": 2}  # fmt: skip
    config = override(preset("tiny"), task)
    write(tmp_path, "sample", 0, [[1.0, 0.0, 0.0], [0.0, 1.0]], [["4", "  ", "5"], ["7", "6"]],
          failures=[["", "", "the verifier died"], ["", ""]])  # fmt: skip
    write_answers(config, tmp_path / "sample", tmp_path / "answers.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [(line["answer"], line["reward"]) for line in lines] == [("4", 1.0), ("5", None), ("7", 0.0), ("6", 1.0)]
    kept = [document(line, config.data) for line in lines]
    assert kept[0] == (conversation, "4"), "roles are kept"
    assert kept[2] == ("3 + 3 =", "7")
    write_answers(override(config, {"rollout.max_new_tokens": 1}), tmp_path / "sample", tmp_path / "answers.jsonl")
    assert not (tmp_path / "answers.jsonl").read_text(), "all were cut off"


def test_a_reward_model_chooses_and_the_verifier_judges(tmp_path):
    config = EvalConfig(ways=("sample",), ks=())
    rewards, answers = [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], [["7", "4", "7"], ["3", "5", "6"]]
    values = [[-1.0, 2.0, 1.0], [-3.0, 2.0, 1.0]]  # right about the first problem alone
    write(tmp_path, "sample", 0, rewards, answers, values)
    found = figures(config, tmp_path, seed=0)["sample"]
    assert (found["any_right"], found["best"]) == (1.0, 0.5)
    assert found["majority"] == 0.5, "7 has two votes of three; of 3, 5 and 6 the first counts"
    assert found["weighted_majority"] == 0.5, "e^2 for 4 outweighs e^1 + e^-1 for 7"


def test_figures_of_episodes_by_hand(tmp_path):
    def played(index, returns, terminated, turns, failures):
        none = [[1]] * len(returns)
        return PlayedSeed(index, ["?"] * len(returns), returns, terminated, turns, none, none, failures, 6, 0.5)

    rows = [
        played(0, [-3.0, -5.0], [True, False], [4, 6], ["", ""]),
        played(1, [-1.0, -9.0], [True, True], [2, 1], ["", "raised ValueError"]),
        played(2, [0.0, 0.0], [False, False], [0, 0], ["hung", "hung"]),
    ]
    (tmp_path / "sample").mkdir()
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows]), tmp_path / "sample" / "000000.parquet")
    found = episode_figures(EvalConfig(ways=("sample",)), tmp_path, seed=0)["sample"]
    assert (found["problems"], found["failed"]) == (3, 3)
    assert found["return"] == pytest.approx((-4 - 1) / 2), "the third seed has no episode that counts"
    assert found["best_return"] == pytest.approx((-3 - 1) / 2)
    assert found["terminated"] == pytest.approx((0.5 + 1) / 2)
    assert found["turns"] == pytest.approx((5 + 2) / 2)
    assert (found["return_low"], found["return_high"]) == (-4.0, -1.0), "of two seeds"
    assert found["generated_tokens"] == 6


def test_votes_are_for_values_and_what_cannot_be_read_never_wins(tmp_path):
    rewards = [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    write(tmp_path, "sample", 0, rewards, [["4", "", "", ""], ["", "", "", ""]])
    found = figures(EvalConfig(ways=("sample",), ks=()), tmp_path, seed=0)["sample"]
    assert found["majority"] == 0.5
    task = object.__new__(Gsm8k)
    said = ["#### .50", "so 1/2", "#### 7", "#### 7", "\\boxed{\\frac{1}{2}}", "hm"]
    write(tmp_path, "beam", 0, [[1.0, 1.0, 0.0, 0.0, 1.0, 0.0]], [[task.answer_of(one) for one in said]])
    assert figures(EvalConfig(ways=("beam",)), tmp_path, seed=0)["beam"]["majority"] == 1.0


def test_none_right_still_has_an_interval(tmp_path):
    write(tmp_path, "greedy", 0, [[0.0]] * 256, [["1"]] * 256)
    found = figures(EvalConfig(ways=("greedy",), chunk=256), tmp_path, seed=0)["greedy"]
    assert (found["accuracy"], found["accuracy_low"]) == (0.0, 0.0)
    assert found["accuracy_high"] == pytest.approx(1.959964**2 / (256 + 1.959964**2), abs=1e-6)


def test_where_nothing_is_simply_right_rewards_are_told_under_their_own_name(tmp_path):
    write(tmp_path, "sample", 0, [[0.2, 0.7], [0.4, 0.1]], [["1", "2"], ["3", "4"]])
    config = EvalConfig(ways=("sample",), ks=(1,))
    found = figures(config, tmp_path, seed=0, right_from=None)["sample"]
    assert (found["reward"], found["best_reward"]) == (pytest.approx(0.3), pytest.approx(0.55))
    assert not {"accuracy", "majority", "best", "pass_at_1"} & found.keys()
    assert figures(config, tmp_path, seed=0, right_from=0.5)["sample"]["best"] == 0.5


def test_failed_scores_are_counted_and_problems_without_an_answer_are_wrong(tmp_path):
    inf = float("inf")
    rewards, values = [[0.0, 1.0], [], [1.0]], [[-inf, 1.0], [], [1.0]]
    write(tmp_path, "mcts", 0, rewards, [["1", "2"], [], ["3"]], values, [["took too long", ""], [], [""]])
    found = figures(EvalConfig(ways=("mcts",)), tmp_path, seed=0)["mcts"]
    assert (found["problems"], found["failed"], found["unanswered"]) == (3, 1, 1)
    said = [line[:15] for line in remarks(EvalConfig(), {"mcts": found})]
    assert said == ["best of mcts: c", "mcts: 1 of 3 pr", "mcts: 1 respons"]
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["best"] == pytest.approx(2 / 3)
    assert "any_right" not in found, "a failure of the verifier is no reward model"
    assert found["reward"] == pytest.approx(1 / 2), "nothing for the second, and the first is not known"


def test_figures_do_not_depend_on_what_else_was_computed_or_lies_there(tmp_path):
    rewards = [[float(i % 3) / 2] for i in range(6)]
    for way in ("greedy", "sample"):
        write(tmp_path, way, 0, rewards, [["1"]] * 6)
    write(tmp_path, "sample", 6, rewards, [["1"]] * 6)  # of an earlier run that asked more
    alone = figures(EvalConfig(ways=("sample",), problems=6, chunk=6), tmp_path, seed=3)["sample"]
    both = figures(EvalConfig(ways=("greedy", "sample"), problems=6, chunk=6), tmp_path, seed=3)["sample"]
    assert alone == both
    assert alone["problems"] == 6
    assert figures(EvalConfig(ways=("mcts",)), tmp_path, seed=0) == {}


class Workers:
    """Answer that a problem is its own number; the first one dies, or hangs."""

    def __init__(self, dies=False, hangs=False):
        self.made, self.dies, self.hangs = 0, dies, hangs

    def spawn(self):
        self.made += 1
        return self.made

    def kill(self, actor): ...

    async def call(self, actor, method, *args):
        if method == "facts":
            return {"num_heldout": 7, "num_train": 0}
        await asyncio.sleep(60 if self.hangs and actor == 1 else 0)
        if self.dies and actor == 1:
            raise WorkerLostError("killed")
        return [PlayedSeed(index, [], [float(index)], [], [], [], [], [], 0, 0.0) for index in args[0]]


def answers_of(workers, **changes):
    async def ask():
        evaluator = Evaluator(override(preset("tiny"), {"rollout.num_workers": 2, **changes}), workers)
        await evaluator.open()
        return await asyncio.wait_for(evaluator.answer(range(5), "greedy"), 20)

    return asyncio.run(ask())


@pytest.mark.parametrize("dies", [False, True])
def test_an_evaluation_needs_no_learner_and_survives_a_workers_death(dies):
    table = answers_of(Workers(dies))
    assert table["index"].to_pylist() == list(range(5))
    assert set(table["way"].to_pylist()) == {"greedy"}


def test_an_evaluation_whose_worker_hangs_ends_and_names_it():
    with pytest.raises(RuntimeError, match=r"cluster.stall_timeout_s = 2 s; waiting for: worker 0: answer"):
        answers_of(Workers(hangs=True), **{"cluster.stall_timeout_s": 2.0})


def test_a_split_without_problems_is_refused():
    with pytest.raises(ValueError, match=r"eval.split = 'train'"):
        answers_of(Workers(), **{"eval.split": "train"})
