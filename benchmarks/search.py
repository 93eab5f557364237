"""Ways of answering, with equal numbers of responses or of tokens: samples, self-consistency, beams and searches.

python benchmarks/search.py --folder outputs/search --model MODEL [--responses 2 4 8 16 32] [--tokens 8 16 32 64 128]

    samples of training problems ─┬─> Q of MCTS-Q
                                  └─> pairs of a right and a wrong answer ─> a reward model
    held-out problems ─> each way, guided by the verifier or by that reward model ─> right answers, responses, tokens

The meaning of a figure depends on what chooses the answer:

    self-consistency    the most frequent answer, on ties the first (Wang et al. 2023); samples are not scored
    best-of-n           the sample with the highest reward-model score; weighted self-consistency: votes weighted by it
    beam, mcts, mcts_q  guided by the reward model, which also chooses among the answers found
    ... (oracle)        the verifier guides and chooses. It knows the right answer, so this is an upper bound and not a
                        usable method; for samples it is pass@n

MODEL was trained by RL. With equal responses, every way makes n responses, however long; with equal tokens, it may
generate that many tokens, in however many responses. A beam is as wide as these tokens allow. Saved tokens are counted
in the engine: the tokens that a search computed, against computing the whole text again in every simulation. Runs that
are already in the folder are not repeated, so a stopped benchmark continues.
"""

import argparse
import asyncio
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
from cached_run import KeptRun, run_kept
from pictures import picture
from record import RESULTS, record

from cola_ray.rollout.batching import RunningBatch
from cola_ray.rollout.engine import LatentEngine, Request
from cola_ray.rollout.search import SearchProblem, TreeSearch
from cola_ray.settings.config import SearchConfig

Settings = dict[str, Any]
Guide = Literal["verifier", "reward_model"]
GUIDES: tuple[Guide, ...] = ("verifier", "reward_model")
BREADTH = 16
"""Actions tried in each state."""


@dataclass(frozen=True)
class Method:
    """One figure of an evaluation: of a way of answering, under a guide."""

    way: str
    guide: Guide
    figure: str


METHODS = {
    "self-consistency": Method("sample", "verifier", "majority"),
    "best-of-n": Method("sample", "reward_model", "best"),
    "weighted self-consistency": Method("sample", "reward_model", "weighted_majority"),
    "beam": Method("beam", "reward_model", "best"),
    "mcts": Method("mcts", "reward_model", "best"),
    "mcts_q": Method("mcts_q", "reward_model", "best"),
    "pass@n (oracle)": Method("sample", "verifier", "best"),
    "beam (oracle)": Method("beam", "verifier", "best"),
    "mcts (oracle)": Method("mcts", "verifier", "best"),
    "mcts_q (oracle)": Method("mcts_q", "verifier", "best"),
}
"""Methods by their names in the tables."""


@dataclass(frozen=True)
class Budget:
    """The responses or tokens that a way may use for one problem."""

    amount: int
    unit: Literal["responses", "tokens"]

    def __str__(self) -> str:
        return f"{self.amount} {self.unit}"

    def settings(self, longest: int) -> dict[str, Settings]:
        """Settings that keep ways within the budget, by group of ways that share a run.

        Args:
            longest: the maximum tokens of a response.
        """
        if self.unit == "responses":
            return {"all": {"eval.ways": ("sample", "beam", "mcts", "mcts_q"), "search.simulations": self.amount}}
        limit = {"search.max_tokens": self.amount}
        return {
            "drawn": {"eval.ways": ("sample", "mcts", "mcts_q"), "search.simulations": self.amount, **limit},
            "beam": {"eval.ways": ("beam",), "search.simulations": beam_width(self.amount, longest), **limit},
        }


def beam_width(tokens: int, longest: int) -> int:
    """The widest beam that can reach the longest responses with this number of tokens; at least 1.

    The first step tries ``BREADTH`` actions, and each later step tries as many after every prefix.
    """
    return max(1, (tokens - BREADTH) // (BREADTH * max(longest - 1, 1)))


# --- what is learnt from samples --------------------------------------------------------------------------------------


def pairs_of(rows: Sequence[Mapping[str, Any]], most: int = 4) -> Iterator[dict[str, str]]:
    """Preference pairs for each problem, at most ``most``: a right and a wrong response, without repeated texts."""
    for row in rows:
        scored = list(zip(row["texts"], row["rewards"], strict=True))
        right = dict.fromkeys(text for text, reward in scored if reward >= 1)
        wrong = dict.fromkeys(text for text, reward in scored if reward < 1)
        for chosen, rejected in itertools.islice(itertools.product(right, wrong), most):
            yield {"prompt": row["question"], "chosen": chosen, "rejected": rejected}


def write_pairs(logged: Path, file: Path) -> int:
    """Write the pairs from logged samples as JSON lines; returns how many there are."""
    rows = [row for part in sorted(logged.glob("*.parquet")) for row in pq.read_table(part).to_pylist()]
    lines = [json.dumps(pair) for pair in pairs_of(rows)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
    return len(lines)


# --- figures ----------------------------------------------------------------------------------------------------------


def figures_of(summaries: Mapping[tuple[Guide, Budget], Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows of the table, by method and budget.

    Args:
        summaries: the figures of each way, by guide and budget.
    """
    found = {}
    for (name, method), budget in itertools.product(METHODS.items(), dict.fromkeys(of for _, of in summaries)):
        of_way = summaries[method.guide, budget][method.way]
        # Without two responses there is nothing to choose from, so the accuracy is taken.
        found[f"{name}, {budget}"] = row_of(of_way, method.figure if method.figure in of_way else "accuracy")
    return found


def row_of(of_way: Mapping[str, Any], figure: str) -> dict[str, Any]:
    return {
        "right": of_way[figure],
        "low": of_way[f"{figure}_low"],
        "high": of_way[f"{figure}_high"],
        "responses": of_way["responses"],
        "tokens": of_way["generated_tokens"],
    }


def plot(figures: Mapping[str, Mapping[str, Any]], budgets: Sequence[Budget], path: Path) -> None:
    """Plot right answers over responses and over tokens; upper bounds are dashed."""
    units = list(dict.fromkeys(budget.unit for budget in budgets))
    with picture(path, len(units), (6 * len(units), 5), sharey=True) as panels:
        for axes, unit in zip(panels, units, strict=True):
            amounts = [budget for budget in budgets if budget.unit == unit]
            for name in METHODS:
                rows = [figures[f"{name}, {budget}"] for budget in amounts]
                right, low, high = (np.array([row[of] for row in rows]) for of in ("right", "low", "high"))
                beside = np.maximum(0, (right - low, high - right))  # at 100 %, rounding may put a bound past the value
                axes.errorbar(
                    [budget.amount for budget in amounts], right, beside, marker="o", markersize=4, capsize=2,
                    linestyle="--" if "oracle" in name else "-", label=name,
                )  # fmt: skip
            axes.axhline(figures["greedy"]["right"], color="grey", linestyle=":", label="greedy")
            axes.set(xlabel=f"{unit} a problem", xscale="log", title=f"equal {unit}")
        panels[0].set(ylabel="problems with a right answer")
        panels[-1].legend(fontsize="small")


def saved_tokens(model: Path, simulations: int = 64, new_tokens: int = 16) -> dict[str, float]:
    """The tokens of all simulated texts divided by the tokens that the engine computed, by prompt length.

    No token ends a response: after random tokens a trained model would end it at once, and trees would have no depth.
    """
    engine = LatentEngine(str(model), dtype="float32", max_model_len=512, stop_token_ids=[], kv_cache_mb=128)
    batch = RunningBatch(engine, drain=True)
    draw, vocabulary = np.random.default_rng(0), engine.llm.llm_engine.model_config.hf_config.vocab_size
    ratios = {}

    async def score(responses: Sequence[np.ndarray]) -> list[float]:
        return draw.random(len(responses)).tolist()

    def request(ids: Sequence[int], seed: int, actions: Sequence[int], budget: int, held: int) -> Request:
        return Request(ids, seed, 1.0, 0, budget, actions, held=held)

    for length in (64, 128, 256, 448):
        prompt = draw.integers(2, vocabulary // 2, length).tolist()
        config = SearchConfig(simulations=simulations, depth=new_tokens)
        search = TreeSearch(config, SearchProblem(prompt, new_tokens, batch.complete, score, request))
        found = asyncio.run(search.run())
        whole = sum(length + len(response) for response in found.responses)
        ratios[f"saved_at_{length}_prompt_tokens"] = whole / found.computed_tokens
    engine.close()
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where runs are kept; reuse it to continue")
    parser.add_argument("--model", type=Path, required=True, help="model/ of a run of `cola_ray rl --preset tiny`")
    parser.add_argument("--task", default="arithmetic")
    parser.add_argument("--responses", type=int, nargs="*", default=[2, 4, 8, 16, 32],
                        help="budgets per problem; without values, this comparison is left out")  # fmt: skip
    parser.add_argument("--tokens", type=int, nargs="*", default=[8, 16, 32, 64, 128],
                        help="budgets in tokens, likewise")  # fmt: skip
    parser.add_argument("--problems", type=int, default=512, help="held-out problems")
    parser.add_argument("--logged", type=int, default=4096, help="training problems to sample for Q and reward model")
    args = parser.parse_args()
    folder, model = args.folder.resolve(), args.model.resolve()
    common = {"preset": "tiny", "task.name": args.task, "model.path": str(model)}
    log = KeptRun(folder / "log", "evaluate", {
        **common, "eval.split": "train", "eval.ways": ("sample",), "eval.problems": args.logged, "eval.chunk": 512,
        "search.simulations": 16,
    })  # fmt: skip
    run_kept([log], parallel=1)
    logged, pairs = log.output / "predictions" / "sample", folder / "pairs.jsonl"
    num_pairs = write_pairs(logged, pairs)
    one_rank = {"cluster.learner_ranks": 1}
    q = KeptRun(folder / "q", "train_q", {
        **common, **one_rank, "data.path": str(logged), "pretrain.steps.q": 1500, "pretrain.batch_size": 256,
    })  # fmt: skip
    scorer = KeptRun(folder / "reward_model", "reward_model", {
        **common, **one_rank, "task.name": "preference", "task.path": str(pairs), "pretrain.steps.reward": 600,
        "pretrain.batch_size": 24,
    })  # fmt: skip
    learnt, scores = run_kept([q, scorer], parallel=1)
    asked = {**common, "eval.problems": args.problems, "eval.chunk": 128}
    guides: dict[Guide, Settings] = {
        "verifier": {},
        "reward_model": {"task.reward_model": str(scorer.output / "model")},
    }
    single = KeptRun(folder / "greedy", "evaluate", {**asked, "eval.ways": ("base", "greedy")})
    longest = single.config.rollout.max_new_tokens
    budgets = [*(Budget(one, "responses") for one in args.responses), *(Budget(one, "tokens") for one in args.tokens)]
    runs = {
        (guide, budget, group): KeptRun(
            folder / f"{guide}-{budget.amount}-{budget.unit}-{group}", "evaluate",
            {**asked, **settings, **guides[guide], "search.root_breadth": BREADTH, "search.breadth": BREADTH,
             **({"q.path": str(q.output / "model")} if "mcts_q" in settings["eval.ways"] else {})},
        )
        for guide, budget in itertools.product(GUIDES, budgets)
        for group, settings in budget.settings(longest).items()
    }  # fmt: skip
    of_single, *found = run_kept([single, *runs.values()], parallel=1)
    summaries: dict[tuple[Guide, Budget], dict[str, Any]] = {}
    for (guide, budget, _), summary in zip(runs, found, strict=True):
        summaries.setdefault((guide, budget), {}).update(summary)
    figures = {way: row_of(of_single[way], "accuracy") for way in ("base", "greedy")} | figures_of(summaries)
    plot(figures, budgets, RESULTS / "search.png")
    about = f"Right answers on {args.problems} held-out problems of {args.task}"
    record("search", figures, [0], f"{about}; both comparisons in docs/results/search.png.")
    of_parts = {
        "q_heldout_loss": learnt["q_heldout_loss"],
        "q_heldout_correlation": learnt["q_heldout_correlation"],
        "pairs": num_pairs,
        "reward_model_loss": scores["reward_loss"],
    }
    record(
        "search_parts", of_parts | saved_tokens(model), [0], "What searches are guided by, and tokens that they save."
    )


if __name__ == "__main__":
    main()
