"""Small heads that all processes step alike: what a step does, by hand, and what it leaves alone."""

import copy

import pytest
import torch
from torch import nn

from cola_ray.algorithms.gradients import NonFiniteError
from cola_ray.algorithms.heads import HeadLearner


def head(weight=(3.0, 4.0)):
    made = nn.Linear(2, 1, bias=False)
    made.weight.data.copy_(torch.tensor([weight]))
    return made


def learner(combine=lambda gradients: None, **given):
    made = HeadLearner(head(), lr=0.1, combine=combine, **{"grad_clip": 0.0} | given)
    made.optimizer = torch.optim.SGD(made.online.parameters(), lr=0.1)  # whose steps can be read off
    return made


def losses(made, *slopes):
    return (made.online(torch.tensor(slope)).sum() for slope in slopes)


def test_a_step_is_on_the_sum_of_all_losses_of_all_processes_and_the_last_ones_alone():
    def doubled(gradients):
        for gradient in gradients:
            gradient.mul_(2)

    made = learner(doubled)
    made.accumulate(losses(made, [9.0, 9.0]))
    made.accumulate(losses(made, [1.0, 0.0], [0.0, 2.0]))
    norm = made.descend(lr=0.5)
    assert float(norm) == pytest.approx(20**0.5)
    assert made.online.weight.tolist() == [[3.0 - 0.5 * 2, 4.0 - 0.5 * 4]]


def test_the_norm_is_clipped_after_it_was_combined_and_told_before():
    made = learner(grad_clip=1.0)
    made.accumulate(losses(made, [3.0, 4.0]))
    assert float(made.descend()) == pytest.approx(5.0)
    torch.testing.assert_close(made.online.weight.data, torch.tensor([[3.0 - 0.06, 4.0 - 0.08]]))


def test_the_target_follows_by_its_share_and_not_without_one():
    made = learner(with_target=True)
    for tau, wanted in ((0.0, 3.0), (0.25, 0.75 * 3.0 + 0.25 * 2.8), (1.0, 2.7)):
        made.accumulate(losses(made, [1.0, 0.0]))
        made.descend(tau=tau)
        assert float(made.target.weight[0, 0]) == pytest.approx(wanted)
    assert made.target.weight[0, 0] == made.online.weight[0, 0], "all of it"
    assert not made.target.weight.requires_grad


@pytest.mark.parametrize("slope", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_stepped_on(slope):
    made = learner(with_target=True)
    made.accumulate(losses(made, [slope, 1.0]))
    with pytest.raises(NonFiniteError, match=f"the gradient of a value is {slope}"):
        made.descend(tau=0.5)
    assert made.online.weight.tolist() == made.target.weight.tolist() == [[3.0, 4.0]]


def test_a_state_goes_on_where_it_was():
    one, other = (HeadLearner(head(start), lr=0.1, grad_clip=1.0, with_target=True, combine=lambda _: None)
                  for start in ((3.0, 4.0), (0.0, 0.0)))  # fmt: skip
    assert one.is_new
    for _ in range(2):
        one.accumulate(losses(one, [1.0, 2.0]))
        one.descend(tau=0.1)
    assert not one.is_new
    other.load_state_dict(copy.deepcopy(one.state_dict()))  # as from a file
    for made in (one, other):
        made.accumulate(losses(made, [1.0, -1.0]))
        made.descend(tau=0.1)
    assert torch.equal(one.online.weight, other.online.weight)
    assert torch.equal(one.target.weight, other.target.weight)
    assert HeadLearner(head(), lr=0.1, grad_clip=0.0).target is None
