"""Running a module without a trace."""

import pytest
import torch
from torch import nn

from lightning_prune._utils.isolation import isolated, user_hooks


class Counting(nn.Module):
    """Counts its forward passes in a buffer, replaces another one, and has a third that is None."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.full((2,), float("nan")))
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.count += 1
        self.last = x.detach().sum(0)
        return self.linear(x)


@pytest.fixture
def calls():
    return []


@pytest.fixture
def module(calls):
    made = Counting()
    made.register_forward_pre_hook(lambda *_: calls.append("before"), prepend=True)
    made.linear.register_forward_hook(lambda *_, **__: calls.append("linear"), with_kwargs=True)
    made.linear.register_forward_hook(lambda *_: calls.append("always"), always_call=True)
    return made.train()


def test_hooks_flags_and_buffers_are_as_before(module, calls):
    tables = [list(each._forward_hooks.items()) for each in module.modules()]
    before = [list(each._forward_pre_hooks.items()) for each in module.modules()]
    count, last = module.count, module.last
    with isolated(module):
        assert not module.training
        assert not module.linear.training
        module(torch.ones(3, 2))
        assert not calls
        assert module.count == 1
    assert module.training
    assert module.linear.training
    assert [list(each._forward_hooks.items()) for each in module.modules()] == tables
    assert [list(each._forward_pre_hooks.items()) for each in module.modules()] == before
    assert module.count is count
    assert module.last is last
    assert (int(count), last.isnan().all()) == (0, True)
    module(torch.ones(3, 2))
    assert calls == ["before", "linear", "always"]


def test_hooks_are_put_back_after_an_error_in_their_order(module, calls):
    with pytest.raises(ZeroDivisionError), isolated(module):
        raise ZeroDivisionError
    module(torch.ones(1, 2))
    assert calls == ["before", "linear", "always"]


def test_hooks_of_libraries_are_called_and_are_not_the_users():
    """Spectral normalisation of torch computes the weight in a pre-hook."""
    module = nn.utils.spectral_norm(nn.Linear(2, 2)).eval()
    assert not user_hooks(module)
    x = torch.ones(1, 2)
    expected = module(x)
    with isolated(module), torch.no_grad():
        module.weight_orig.mul_(3)  # which the hook divides by its norm
        assert torch.allclose(module(x), expected, atol=1e-6)


def test_a_hook_that_is_added_meanwhile_stays(module, calls):
    with isolated(module):
        module.linear.register_forward_hook(lambda *_: calls.append("new"))
    module(torch.ones(1, 2))
    assert calls == ["before", "linear", "always", "new"]


def test_handles_still_remove_their_hooks():
    module, calls = nn.Linear(2, 2), []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    with isolated(module):
        pass
    handle.remove()
    module(torch.ones(1, 2))
    assert not calls
    assert not user_hooks(module)


def test_nested_isolation_puts_back_everything_once(module, calls):
    with isolated(module), isolated(module):
        module(torch.ones(1, 2))
    assert not calls
    assert len(user_hooks(module)) == 3
