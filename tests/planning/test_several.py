"""Planning over blocks and methods on a real model under a clock that is known."""

import json
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import Block

import lightning_prune as lp
from helpers.clock import set_latency
from lightning_prune.patching import find_vision_transformer
from lightning_prune.patching.class_swap import is_patched_module
from lightning_prune.planning import plan_blocks
from lightning_prune.planning.api import plan_blocks_for
from lightning_prune.planning.sensitivity import Sensitivity
from lightning_prune.reduction import Reduction, resolve

from .clocked import DEPTH, IMAGES, N, milliseconds, planned, vit

pytestmark = pytest.mark.usefixtures("clock")


def test_the_front_is_what_it_is_said_to_be():
    made = planned(methods=["topk"])
    for entry in made.front:
        assert entry.milliseconds == pytest.approx(milliseconds(entry.schedule), rel=0.01)
    latencies = [entry.milliseconds for entry in made.front]
    costs = [entry.cost for entry in made.front]
    assert latencies == sorted(latencies, reverse=True)
    assert costs == sorted(costs)
    assert (made.front[0].schedule.total_removed, made.front[0].accuracy) == (0, 1.0)


def test_costs_of_the_front_are_those_of_the_blocks():
    model = vit()
    made = planned(model, methods=["topk"])
    table = Sensitivity(find_vision_transformer(model), resolve("topk"), range(DEPTH), range(2, N), N)
    table.add(IMAGES)
    for entry in made.front:
        if len(entry.schedule.reducing) == 1:
            (block, removed), *_ = entry.schedule.reducing.items()
            exact = table.table[block, table.counts.index(N - removed)]
            assert entry.cost == pytest.approx(exact, rel=0.5, abs=0.02)  # between measured counts it is an estimate


@pytest.mark.parametrize("speedup", [1.2, 1.5, 2.0])
def test_a_latency_budget_is_met_and_used(speedup):
    made = planned(methods=["topk", "pomt-nearest"], objective=lp.LatencyBudget(speedup=speedup))
    assert milliseconds(made.schedule) <= DEPTH * N / speedup * 1.01
    assert made.pruned.ratio == pytest.approx(milliseconds(made.schedule) / (DEPTH * N))
    assert made.speedup == pytest.approx(1 / made.pruned.ratio)
    assert made.latency_ms == pytest.approx(made.predicted_ms, rel=0.02)
    slack = [e for e in made.front if milliseconds(e.schedule) <= DEPTH * N / speedup and e.method == made.method]
    used = next(e for e in made.front if e.schedule.removed == made.schedule.removed and e.method == made.method)
    assert used.cost == pytest.approx(min(e.cost for e in slack), abs=0.05)


def test_accuracy_budget_and_utility():
    strict = planned(methods=["topk"], objective=lp.AccuracyBudget(0.0))
    loose = planned(methods=["topk"], objective=lp.AccuracyBudget(0.3))
    assert strict.accuracy[strict.tokens] >= 1.0
    assert loose.accuracy[loose.tokens] >= 0.7
    assert milliseconds(loose.schedule) <= milliseconds(strict.schedule)


def test_the_same_seed_gives_the_same_plan():
    plans = [planned(objective=lp.LatencyBudget(speedup=1.5)) for _ in range(2)]
    assert plans[0].schedule.removed == plans[1].schedule.removed
    assert plans[0].method == plans[1].method


def test_several_objectives_are_measured_for_once(monkeypatch):
    objectives = [lp.Utility(0.3), lp.LatencyBudget(speedup=1.5), lp.AccuracyBudget(0.05)]
    alone = [planned(methods=["topk"], objective=objective) for objective in objectives]
    passes = []
    real = Sensitivity.add
    monkeypatch.setattr(
        Sensitivity, "add", lambda self, images, *more: (passes.append(1), real(self, images, *more))[1]
    )
    planned(methods=["topk"])
    once = len(passes)
    passes.clear()
    usual = {"example_inputs": IMAGES[:2], "time_limit": 3, "progress": False, "methods": ["topk"]}
    together = plan_blocks_for(vit(), IMAGES, objectives, **usual)
    assert len(passes) == once
    for plan, other in zip(together, alone, strict=True):
        assert plan.objective == other.objective
        value = plan.objective.among(np.array([plan.pruned.ratio, 1.0]), np.array([plan.accuracy[plan.tokens], 1.0]))[0]
        single = plan.objective.among(
            np.array([other.pruned.ratio, 1.0]), np.array([other.accuracy[other.tokens], 1.0])
        )
        assert value >= single[0] - 0.02


def test_all_methods_see_the_same_images_and_the_plan_says_how_many(monkeypatch):
    seen = Counter()
    real = Sensitivity.add

    def add(self, images, tick=lambda: None):
        seen[self._reduction.name] += len(images)
        seconds[0] += 0.1 * len(images) if self._reduction.name == "tome" else 0.001 * len(images)
        return real(self, images, tick)

    seconds = [0.0]
    monkeypatch.setattr(Sensitivity, "add", add)
    monkeypatch.setattr("lightning_prune.planning.multi_block.time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    many = IMAGES.repeat(4, 1, 1, 1)
    curve = planned(methods=["topk"]).profile
    for methods, limit, images in ((["tome", "topk"], 1.0, 16), (["topk", "tome"], 1.0, 16), (["tome"], 1e-6, 8)):
        seen.clear()
        made = planned(images=many, methods=methods, time_limit=limit, profile=curve)
        assert dict(seen) == dict.fromkeys(methods, images)
        assert made.images == images
    assert made.sensitivity_seconds == pytest.approx(0.8)
    assert made.to_dict()["sensitivity_seconds"] == made.sensitivity_seconds


def test_scores_are_those_of_the_measured_schedules():
    made = planned(methods=["topk"], objective=lp.Utility(0.4))
    measured = [entry for entry in made.front if entry.accuracy is not None]
    dense = made.front[0].milliseconds
    slowest, best = max(e.milliseconds for e in measured), max(e.accuracy for e in measured)
    assert slowest == dense
    for entry in measured:
        own = 0.4 * (1 - entry.milliseconds / slowest) + 0.6 * entry.accuracy / best
        assert made.scores()[entry.schedule.tokens(N)[-1]] >= own - 1e-12
    assert set(made.scores()) == {entry.schedule.tokens(N)[-1] for entry in measured}


def state(model):
    modules = list(model.modules())
    return (
        [module.training for module in modules],
        [set(vars(module)) for module in modules],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules],
        [parameter.requires_grad for parameter in model.parameters()],
        any(map(is_patched_module, modules)),
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("fails_at", [None, 0, 7, 60])
def test_everything_is_as_before_also_where_a_search_fails(fails_at):
    model = vit(drop_rate=0.3).train()
    model.blocks[1].eval()
    passes = []

    def interrupt(*_):
        passes.append(None)
        if len(passes) - 1 == fails_at:
            raise KeyboardInterrupt

    hook = model.blocks[3].register_forward_hook(interrupt)
    before = state(model)
    with pytest.raises(KeyboardInterrupt) if fails_at is not None else nullcontext():
        plan_blocks(model, IMAGES, example_inputs=IMAGES[:2], methods=["topk"], time_limit=0.2, progress=False)
    assert state(model) == before
    assert fails_at is None or len(passes) == fails_at + 1
    hook.remove()


def test_a_cut_after_the_mlp_is_said_once(caplog):
    class Odd(Block):
        """Of no known form."""

        def forward(self, x):
            return x + self.mlp(self.norm2(x + self.attn(self.norm1(x))))

    planned(vit(block_fn=Odd), methods=["topk", "tome"], objective=lp.Utility(0.9))
    assert sum("is cut after its MLP" in message for message in caplog.messages) == 1


def test_a_model_that_gains_nothing_stays_dense(monkeypatch):
    set_latency(monkeypatch, lambda alternative: 0.01)
    made = planned(methods=["topk"])
    assert made.removed == 0
    assert made.speedup == 1.0


def test_plan_as_plain_values():
    made = planned(methods=["topk"], objective=lp.LatencyBudget(speedup=1.5))
    document = json.loads(json.dumps(made.to_dict()))
    assert document["method"] == "topk"
    assert document["images"] == 24
    assert len(document["front"]) == len(made.front)
    assert document["front"][0]["removed"] == [0] * DEPTH
    assert str(made.schedule.method) == "topk"
    assert np.isfinite(document["speedup"])


def test_a_method_of_a_third_party_is_planned_like_any_other():
    class Last(Reduction):
        name = "last"

        def max_removed(self, tokens, prefix_tokens):
            return tokens - prefix_tokens - 1

        def reduce(self, sequence, remove):
            left = sequence.tokens.shape[1] - remove
            positions = torch.arange(left).expand(len(sequence.tokens), left)
            return lp.reduction.base.ReductionOutput(sequence.tokens[:, :left], positions)

    assert planned(methods=[Last()], objective=lp.LatencyBudget(speedup=1.5)).method == "last"
