"""ZeRO-3's optimizer state for a different number of ranks than wrote it.

    FOLDER/*zero_pp_rank_<q>_mp_rank_00_optim_states.pt     from each of Q ranks: a parameter's q-th slice of Q
    state_of_rank(FOLDER, groups, r, R)                     state for DeepSpeed to load on rank r: its r-th slice of R
    weights(FOLDER)                                         whole weights, without a process group

DeepSpeed pads each parameter to a multiple of the ranks and cuts it into equal slices; a rank keeps its slices end to
end in one flat tensor for each sub-group of parameters. Float32 weights and Adam's moments have the same layout. Here
slices are cut anew and their elements copied, never computed, so the state is the same bit for bit.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import FP32_FLAT_GROUPS, OPTIMIZER_STATE_DICT, PARAM_SHAPES
from torch import Tensor

from cola_ray.runs.checkpoints import CheckpointError

_OF_RANKS = "*zero_pp_rank_{}_mp_rank_00_optim_states.pt"
_Flats = Sequence[Tensor]
"""A rank's flat tensor of each sub-group."""


def saved_ranks(folder: Path) -> int:
    """The number of ranks that wrote a DeepSpeed checkpoint."""
    return len(list(folder.glob(_OF_RANKS.format("*"))))


def weights(folder: Path) -> dict[str, Tensor]:
    """Whole float32 weights of the trained parameters, by name, on the CPU.

    Args:
        folder: a DeepSpeed checkpoint.
    """
    saved, shapes = _saved(folder)
    whole = [[shape.numel() for shape in group.values()] for group in shapes]
    flats = _cut([one[FP32_FLAT_GROUPS] for one in saved], whole, whole, 0, 1)
    return {
        name: piece.view(shape)
        for group, flat in zip(shapes, flats, strict=True)
        for (name, shape), piece in zip(
            group.items(), flat.split([shape.numel() for shape in group.values()]), strict=True
        )
    }


def state_of_rank(folder: Path, groups: Sequence[Sequence[int]], rank: int, ranks: int) -> dict[str, Any]:
    """The state that DeepSpeed's stage-3 optimizer loads on one of ``ranks``, on the CPU.

    Files are memory-mapped: a rank reads only the bytes of its own slices.

    Args:
        folder: a DeepSpeed checkpoint.
        groups: numbers of elements of each parameter, by sub-group, in the optimizer's order.

    Raises:
        CheckpointError: the checkpoint has different parameters.
    """
    saved, shapes = _saved(folder)
    before = [[shape.numel() for shape in group.values()] for group in shapes]
    if [*itertools.chain(*before)] != [*itertools.chain(*groups)]:
        raise CheckpointError(f"{folder} has other parameters than the model")

    def cut(of_ranks: Sequence[_Flats]) -> list[Tensor]:
        return _cut(of_ranks, before, groups, rank, ranks)

    adam = saved[0][OPTIMIZER_STATE_DICT]
    (options,) = adam["param_groups"]
    state: dict[int, dict[str, Any]] = {index: {} for index in range(len(groups))} if adam["state"] else {}
    for name, value in (adam["state"][0] if state else {}).items():
        of_ranks = [[of_group[name] for of_group in one[OPTIMIZER_STATE_DICT]["state"].values()] for one in saved]
        whole = not isinstance(value, Tensor) or value.dim() == 0  # the number of steps
        for index, of_group in enumerate([value] * len(groups) if whole else cut(of_ranks)):
            state[index][name] = of_group
    return saved[0] | {
        OPTIMIZER_STATE_DICT: {"state": state, "param_groups": [options | {"params": list(range(len(groups)))}]},
        FP32_FLAT_GROUPS: cut([one[FP32_FLAT_GROUPS] for one in saved]),
    }


def _saved(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, torch.Size]]]:
    """The optimizer's state of each rank, and the shapes of each sub-group's parameters, by name."""
    files = [next(folder.glob(_OF_RANKS.format(one))) for one in range(saved_ranks(folder))]
    shapes = _opened(next(folder.glob("*zero_pp_rank_0_mp_rank_00_model_states.pt")))[PARAM_SHAPES]
    return [_opened(file)[OPTIMIZER_STATE_DICT] for file in files], shapes


def _cut(
    of_ranks: Sequence[_Flats], before: Sequence[Sequence[int]], groups: Sequence[Sequence[int]], rank: int, ranks: int
) -> list[Tensor]:
    """This rank's flat tensors, cut from those of the former ranks; padding is zero."""
    count, kind = len(of_ranks), of_ranks[0][0].dtype
    flats = [torch.zeros(sum(_slice(numel, ranks) for numel in group), dtype=kind) for group in groups]
    places = zip(itertools.chain(*groups), _places(before, count), _places(groups, ranks), strict=True)
    for numel, (old_group, old_start), (group, start) in places:
        old, new = _slice(numel, count), _slice(numel, ranks)
        first, end = min(rank * new, numel), min((rank + 1) * new, numel)
        while first < end:
            writer, inside = divmod(first, old)
            length = min(end - first, old - inside)
            piece = of_ranks[writer][old_group][old_start + inside : old_start + inside + length]
            flats[group].narrow(0, start + first - rank * new, length).copy_(piece)
            first += length
    return flats


def _slice(numel: int, ranks: int) -> int:
    """Number of elements of a rank's slice, including padding."""
    return -(-numel // ranks)


def _places(groups: Sequence[Sequence[int]], ranks: int) -> Iterator[tuple[int, int]]:
    """The sub-group of each parameter, and where in its flat tensor a rank's slice begins."""
    for index, group in enumerate(groups):
        for start in [0, *itertools.accumulate(_slice(numel, ranks) for numel in group)][:-1]:
            yield index, start


def _opened(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    return content
