"""What a search over blocks is given, and what it refuses."""

import pytest
import torch

import lightning_prune as lp
from lightning_prune.patching import find_vision_transformer
from lightning_prune.patching.class_swap import is_patched_module
from lightning_prune.planning import plan_blocks
from lightning_prune.planning.api import CURVE
from lightning_prune.profiling.model_variants import Variant, VariantSwitch
from lightning_prune.reduction import RandomDrop, Reduction

from .clocked import DEPTH, IMAGES, planned, vit

pytestmark = pytest.mark.usefixtures("clock")


def test_a_given_profile_is_planned_on_and_not_measured_again(monkeypatch):
    model = vit()
    profile = lp.profile_latency(model, IMAGES[:2], method=CURVE, time_limit=1, verbose=False)
    monkeypatch.setattr("lightning_prune.planning.api.profile_latency", None)
    made = planned(model, methods=["topk"], profile=profile, objective=lp.LatencyBudget(speedup=1.5))
    assert made.profile is profile
    assert made.removed > 0


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: (vit(embed_dim=64), CURVE), r"is of a model with \d+ parameters; this one has \d+"),
        (lambda: (vit(), "pomt"), r"is of pomt at block 1; .* plan_blocks needs a curve of Random\(site=\"input\"\)"),
        (lambda: (vit(), RandomDrop()), r"is of random at block 1; asked for is random at block 0"),
        (
            lambda: (vit(), RandomDrop(seed=3, site="input")),
            r"is of random with seed=3, site='input'; asked for is Random\(seed=0, site='input'\)",
        ),
    ],
    ids=["model", "method", "block", "settings"],
)
def test_a_profile_of_something_else_is_refused(made, message):
    model, method = made()
    profile = lp.profile_latency(model, IMAGES[:2], method=method, time_limit=0.2, verbose=False)
    with pytest.raises(lp.ArgumentError, match=message):
        planned(methods=["topk"], profile=profile)


def test_a_profile_of_random_tokens_inside_block_0_is_refused():
    model = vit()
    profile = lp.profile_latency(model, IMAGES[:2], method="random", block=0, time_limit=0.2, verbose=False)
    with pytest.raises(
        lp.ArgumentError, match=r"is of random with seed=0, site='block'; asked for is Random\(seed=0, site='input'\)"
    ):
        planned(model, methods=["topk"], profile=profile)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "fast"}, r"`objective` must be an Objective such as Utility\(0.5\), got 'fast'"),
        ({"time_limit": -1}, "`time_limit` must be a number > 0, got -1"),
        ({"time_limit": None}, "`time_limit` must be a number > 0, got None"),
        ({"time_limit": True}, "`time_limit` must be a number > 0, got True"),
        ({"methods": "tome"}, "`methods` must be a list of names or reductions, got 'tome'"),
        ({"methods": ["topk", "tome", "topk"]}, r"`methods` must differ from one another, got TopK\(\) twice"),
        ({"example_inputs": IMAGES[0]}, r"`example_inputs` must be images \(B, .*\), got \(3, 32, 32\)"),
        (
            {"example_inputs": torch.randn(2, 3, 64, 64)},
            r"`images` must be of the size of `example_inputs`, \(3, 64, 64\), got \(3, 32, 32\)",
        ),
        ({"profile": "profile.json"}, "`profile` must be a LatencyProfile, got 'profile.json'"),
    ],
)
def test_arguments_are_checked_before_anything_is_timed(monkeypatch, arguments, message):
    monkeypatch.setattr("lightning_prune.planning.api.profile_latency", None)
    with pytest.raises(lp.ArgumentError, match=message):
        planned(**arguments)


class Value(Reduction):
    """Compares by value, and has no hash."""

    name = "value"
    __hash__ = None

    def max_removed(self, tokens, prefix_tokens):
        return tokens - prefix_tokens - 1

    def reduce(self, sequence, remove):
        raise AssertionError("patching reduces nothing, and a search must refuse before it does")


def test_a_reduction_without_a_hash_is_refused_at_once():
    with pytest.raises(
        lp.ArgumentError,
        match=r"A method that is searched over blocks must have a hash, .* got Value\(\): unhashable type",
    ):
        planned(methods=[Value()])


def test_a_reduction_without_a_hash_is_timed_like_any_other():
    model = vit()
    switch = VariantSwitch(find_vision_transformer(model))
    for removed in (3, 5):
        switch.to(Variant(Value(), lp.Schedule.single(DEPTH, 1, removed)))
        assert [is_patched_module(block) for block in model.blocks] == [False, True, False, False]
    switch.off()
    assert not any(map(is_patched_module, model.modules()))


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([], "`methods` must hold at least one method, got none"),
        (["vwt-intra"], "Only methods that act in blocks can be planned over several of them; vwt-intra does not"),
        (["tomee"], "Did you mean 'tome'"),
    ],
)
def test_methods_that_cannot_be_planned(methods, message):
    with pytest.raises(lp.ArgumentError, match=message):
        planned(methods=methods)


def test_a_patched_model_is_not_planned_for():
    model = vit()
    with (
        lp.patch(model, "pomt", [0, 4, 0, 0]),
        pytest.raises(lp.ArgumentError, match="`model` must be dense, got a patched model"),
    ):
        plan_blocks(model, IMAGES, example_inputs=IMAGES[:2], progress=False)
