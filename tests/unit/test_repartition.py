"""Optimizer state that other ranks have saved: cut anew it is the same, and training goes on as if nothing had been."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import nn

from cola_ray.learner.engine import ZeroEngine
from cola_ray.learner.repartition import saved_ranks, state_of_rank
from cola_ray.runs.checkpoints import CheckpointError

KINDS = ("exp_avg", "exp_avg_sq", "fp32")
SIZES = (35, 7, 1, 12, 64)
GROUPS = {"one": [SIZES], "three": [SIZES[:2], SIZES[2:3], SIZES[3:]]}


def drawn():
    """Whole tensors of each kind, in the parameters' order."""
    generator = torch.Generator().manual_seed(0)
    return {kind: [torch.randn(size, generator=generator) for size in SIZES] for kind in KINDS}


def by_groups(whole, groups):
    parts = iter(whole)
    return [list(itertools.islice(parts, len(group))) for group in groups]


def padded(tensor, ranks):
    return F.pad(tensor.flatten(), (0, -tensor.numel() % ranks))


def write(folder, whole, groups, ranks, prefix="", like=None):
    """What DeepSpeed writes, from whole tensors.

    Args:
        like: the rest is as in this state.
    """
    like = like or {"optimizer_state_dict": {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 0.5}]},
                    "overflow": False}  # fmt: skip
    (options,), step = (like["optimizer_state_dict"][name] for name in ("param_groups", "state"))
    folder.mkdir(parents=True)
    for rank in range(ranks):
        flats = {kind: [torch.cat([padded(one, ranks).chunk(ranks)[rank] for one in group])
                        for group in by_groups(whole[kind], groups)] for kind in KINDS}  # fmt: skip
        adam = {index: {"step": step[0]["step"], "exp_avg": m, "exp_avg_sq": v}
                for index, (m, v) in enumerate(zip(flats["exp_avg"], flats["exp_avg_sq"], strict=True))}  # fmt: skip
        about = options | {"params": list(range(len(groups)))}
        state = like | {"optimizer_state_dict": {"state": adam, "param_groups": [about]},
                        "fp32_flat_groups": flats["fp32"]}  # fmt: skip
        name = f"{prefix}zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"optimizer_state_dict": state}, folder / f"{name}_optim_states.pt")
        shapes = [{f"{index}.{n}": torch.Size([numel]) for n, numel in enumerate(group)}
                  for index, group in enumerate(groups)]  # fmt: skip
        torch.save({"param_shapes": shapes}, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")


@pytest.mark.parametrize(("before", "now"), [("one", "one"), ("three", "one"), ("one", "three")])
@pytest.mark.parametrize(("then", "ranks"), [(2, 3), (3, 2), (1, 5), (8, 1), (4, 4)])
def test_slices_of_all_ranks_together_are_the_whole(tmp_path, then, ranks, before, now):
    whole, groups = drawn(), GROUPS[now]
    write(tmp_path / "zero", whole, GROUPS[before], then, prefix="bf16_")
    assert saved_ranks(tmp_path / "zero") == then
    states = [state_of_rank(tmp_path / "zero", groups, rank, ranks) for rank in range(ranks)]
    for state in states:
        adam = state["optimizer_state_dict"]
        assert adam["param_groups"] == [{"lr": 0.5, "params": list(range(len(groups)))}]
        assert [float(of_group["step"]) for of_group in adam["state"].values()] == [7.0] * len(groups)
        assert state["overflow"] is False
    for kind in KINDS:
        for index, tensors in enumerate(by_groups(whole[kind], groups)):
            widths = [padded(one, ranks).numel() // ranks for one in tensors]
            flats = [state["fp32_flat_groups"][index] if kind == "fp32"
                     else state["optimizer_state_dict"]["state"][index][kind] for state in states]  # fmt: skip
            slices = zip(*(flat.split(widths) for flat in flats), strict=True)
            for tensor, of_ranks in zip(tensors, slices, strict=True):
                assert torch.equal(torch.cat(of_ranks), padded(tensor, ranks))


def test_another_models_checkpoint_is_refused(tmp_path):
    write(tmp_path / "zero", drawn(), GROUPS["one"], 2)
    with pytest.raises(CheckpointError, match="has other parameters than the model"):
        state_of_rank(tmp_path / "zero", [SIZES[:-1]], 0, 3)


def engine_of(bfloat16):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    module = module.to(torch.bfloat16) if bfloat16 else module
    return ZeroEngine(module, ("0.", "2.weight"), lr=0.01, betas=(0.9, 0.95), weight_decay=0.01, bfloat16=bfloat16)


def trained(zero, steps):
    for step in steps:
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(zero.trained[0][1].dtype)
        zero.backward(zero.engine(inputs).float().pow(2).mean(), last=True)
        zero.step()
    return zero


def state_of(zero):
    read = {"fp32": safe_get_full_fp32_param}
    for kind in KINDS[:2]:
        read[kind] = lambda parameter, kind=kind: safe_get_full_optimizer_state(parameter, kind)
    return {kind: [read[kind](parameter).clone() for _, parameter in zero.trained] for kind in KINDS}


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("then", [2, 3])
def test_a_rank_goes_on_where_several_were(tmp_path, one_rank, then, bfloat16):
    """Their files are cut here from what one rank has saved; three more steps are those of a run without a pause."""
    zero = trained(engine_of(bfloat16), range(4))
    zero.save(tmp_path / "one", {"step": 4})
    saved = state_of(zero)
    (file,) = (tmp_path / "one" / "zero").glob("*_optim_states.pt")
    prefix = file.name[: file.name.index("zero_pp")]
    like = torch.load(file, weights_only=False)["optimizer_state_dict"]
    wanted = state_of(trained(zero, range(4, 7)))
    zero.close()
    groups = [[tensor.numel() for tensor in saved["fp32"]]]
    write(tmp_path / "several" / "zero", saved, groups, then, prefix, like)
    (tmp_path / "several" / "notes.json").write_text('{"step": 4}')
    other = trained(engine_of(bfloat16), range(20, 22))
    assert other.load(tmp_path / "several") == {"step": 4}
    for kind, tensors in state_of(other).items():
        assert all(map(torch.equal, tensors, saved[kind])), kind
    for kind, tensors in state_of(trained(other, range(4, 7))).items():
        assert all(map(torch.equal, tensors, wanted[kind])), kind
    other.close()
