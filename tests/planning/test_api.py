"""Planning on a small model under a clock that is known."""

import json
import re
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from timm.models.vision_transformer import Block

import lightning_prune as lp
from helpers.clock import TokenClock
from helpers.watch import before_forward
from lightning_prune.patching import find_vision_transformer
from lightning_prune.patching.class_swap import is_patched_module
from lightning_prune.planning import AUTO_METHODS, measurements, plan_many
from lightning_prune.planning.measurements import Measurements
from lightning_prune.planning.method_selection import method_labels
from lightning_prune.planning.mixed_front import MixedFront
from lightning_prune.planning.plan_search import finished
from lightning_prune.planning.probed_schedules import PROBES, probe_schedules
from lightning_prune.planning.sensitivity import Sensitivity
from lightning_prune.profiling import Estimate, LatencyStats, measurement_context
from lightning_prune.profiling.interleaved_timer import InterleavedTimer
from lightning_prune.profiling.output_kinds import OUTPUT_KINDS
from lightning_prune.reduction import Reduction, ToMe, resolve

from .clocked import DEPTH, IMAGES, N, milliseconds, planned, vit

pytestmark = pytest.mark.usefixtures("clock")
OPTIONS: dict[str, Any] = {"calibration": IMAGES, "time_limit": 20, "verbose": False}


def test_the_front_is_what_it_is_said_to_be():
    made = planned(methods="topk")
    for candidate in made.front:
        assert candidate.ratio * DEPTH * N == pytest.approx(milliseconds(candidate.schedule), rel=0.01)
    ratios, costs = [c.ratio for c in made.front], [c.cost for c in made.front]
    assert ratios == sorted(ratios, reverse=True)
    assert costs == sorted(costs)
    assert (made.front[0].schedule.total_removed, made.front[0].accuracy) == (0, 1.0)


def test_costs_of_the_front_are_those_of_the_blocks():
    model = vit()
    made = planned(model, methods="topk")
    table = Sensitivity(find_vision_transformer(model), resolve("topk"), range(DEPTH), range(2, N), N)
    table.add(IMAGES)
    for candidate in made.front:
        if len(candidate.schedule.reducing) == 1:
            (block, removed), *_ = candidate.schedule.reducing.items()
            exact = table.table[block, table.counts.index(N - removed)]
            assert candidate.cost == pytest.approx(exact, rel=0.5, abs=0.02)  # an estimate between measured counts


@pytest.mark.parametrize("speedup", [1.2, 1.5, 2.0])
def test_a_latency_budget_is_met_and_used(speedup):
    made = planned(methods=["topk", "pomt-nearest"], objective=lp.LatencyBudget(speedup=speedup))
    assert made.met
    assert milliseconds(made.schedule) <= DEPTH * N / speedup * 1.01
    assert made.pruned.ratio == pytest.approx(milliseconds(made.schedule) / (DEPTH * N))
    assert made.speedup == pytest.approx(1 / made.pruned.ratio)
    assert made.latency_ms == pytest.approx(made.predicted_ms, rel=0.02)
    own = [c for c in made.front if c.method == made.label]
    used = next(c for c in own if c.schedule.removed == made.schedule.removed)
    within = [c for c in own if milliseconds(c.schedule) <= DEPTH * N / speedup]
    assert used.cost == pytest.approx(min(c.cost for c in within), abs=0.05)
    assert used.accuracy == made.accuracy
    assert used.timing == made.pruned


@pytest.mark.parametrize("methods", ["topk", ["tome", "topk"]], ids=str)
def test_the_exact_tail_is_part_of_what_is_predicted_and_timed(methods):
    made = planned(methods=methods, objective=lp.LatencyBudget(speedup=1.5), tail=None)
    assert made.met
    assert made.schedule.removed[-1] == 0
    assert made.pruned.ratio == pytest.approx(milliseconds(made.schedule, tail=True) / (DEPTH * N))
    # The smallest count of the curve stands for the one token that the tail leaves.
    smallest = made.profile.tokens[0]
    assert abs(made.latency_ms - made.predicted_ms) <= 0.6 * (smallest - 1) + 0.02 * made.latency_ms
    for candidate in made.front:
        assert candidate.schedule.removed[-1] in (0, candidate.schedule.total_removed)
    without = planned(methods=methods, objective=lp.LatencyBudget(speedup=1.5), tail=False)
    assert made.total_removed < without.total_removed
    assert made.pruned.ratio == pytest.approx(without.pruned.ratio, rel=0.1)
    exact = [c for c in made.front if c.schedule.removed[-1]]
    assert exact
    assert all(c.cost < 1e-6 for c in exact)


def test_accuracy_budgets_and_the_default_objective():
    strict, loose, default = (
        planned(methods="topk", objective=o) for o in (lp.AccuracyBudget(0), lp.AccuracyBudget(0.3), None)
    )
    assert strict.accuracy >= 1.0
    assert loose.accuracy >= 0.7
    assert milliseconds(loose.schedule) <= milliseconds(default.schedule) <= milliseconds(strict.schedule)
    assert default.objective == lp.AccuracyBudget(0.005)
    assert default.accuracy >= 0.995


def test_the_same_seed_gives_the_same_plan():
    plans = [planned(objective=lp.LatencyBudget(speedup=1.5), seed=3) for _ in range(2)]
    assert plans[0].schedule.removed == plans[1].schedule.removed
    assert plans[0].method == plans[1].method


def test_auto_searches_several_methods(monkeypatch):
    monkeypatch.setattr(measurements, "dominated_methods", lambda *_: {})  # one is surely worse on noise
    made = planned(objective=lp.LatencyBudget(speedup=1.5))
    assert {c.method for c in made.front} - {"mixed"} == set(AUTO_METHODS)


@pytest.mark.parametrize("methods", [["tome", "topk"], ["topk", "resize"]])
def test_a_plan_of_several_methods_is_used_saved_and_found_again(methods, monkeypatch, tmp_path):
    """With a proxy that prefers it: on noise, a small model does not."""
    real = Measurements.accuracy

    def prefers(self, reduction, schedule):
        found = real(self, reduction, schedule)
        return found if reduction is None else found._replace(value=0.9 * found.value)

    monkeypatch.setattr(Measurements, "accuracy", prefers)
    monkeypatch.setattr(MixedFront, "_promises_more", lambda *_: True)
    monkeypatch.setattr(MixedFront, "_may_be_best", lambda *_: True)
    monkeypatch.setattr(measurements, "dominated_methods", lambda *_: {})  # one is surely worse on noise
    model = vit()
    made = planned(model, methods=methods, objective=lp.LatencyBudget(speedup=1.4))
    assert (made.method, made.label, made.reduction) == ("mixed", "mixed", None)
    assert {str(spec) for spec in made.schedule.methods.values()} == set(methods)
    assert made.schedule.methods.keys() == made.schedule.reducing.keys()
    assert made.pruned is not None
    assert made.schedule.method_label in made.reason
    assert lp.Schedule.load(made.save(tmp_path / "schedule.yaml")) == made.schedule
    (entry,) = (e for e in made.to_dict()["front"] if e["measured_ratio"] and e["method"] == "mixed")
    assert entry["methods"] == made.schedule.method_label
    with torch.no_grad(), lp.patch(model, made) as handle:
        tokens = handle.schedule.tokens(N)
        assert model(IMAGES).isfinite().all()
    assert tokens[-1] == made.tokens
    again = planned(vit(), methods=methods, objective=lp.LatencyBudget(speedup=1.4))
    assert again.schedule == made.schedule
    slow = replace(made, pruned=replace(made.pruned, ratio=0.99)).or_dense_if_slower()
    assert slow.total_removed == 0
    assert lp.reduction.resolve(slow.method) == slow.reduction
    assert not planned(model, methods=methods, objective=lp.LatencyBudget(speedup=50)).met


def test_several_objectives_share_the_measurements(monkeypatch):
    objectives = [lp.Utility(0.3), lp.LatencyBudget(speedup=1.5), lp.AccuracyBudget(0.05)]
    alone = [planned(methods="topk", objective=objective) for objective in objectives]
    passes = []
    real = Sensitivity.add
    monkeypatch.setattr(
        Sensitivity, "add", lambda self, images, *more: (passes.append(1), real(self, images, *more))[1]
    )
    planned(methods="topk", use_cache=False)
    once = len(passes)
    passes.clear()
    together = plan_many(vit(), IMAGES[:2], objectives, methods="topk", use_cache=False, **OPTIONS)
    assert len(passes) == once > 0
    for plan, other in zip(together, alone, strict=True):
        assert plan.objective == other.objective
        values = [
            plan.objective.score_feasible(np.array([p.pruned.ratio, 1.0]), np.array([p.accuracy, 1.0]))[0]
            for p in (plan, other)
        ]
        assert values[0] >= values[1] - 0.02


@pytest.mark.parametrize("blocks", [1, 0.25, [1], [1, 3], range(2, 4)], ids=str)
def test_only_allowed_blocks_reduce(blocks):
    allowed = set(blocks) if isinstance(blocks, list | range) else {1}
    made = planned(methods=["tome", "pomt"], blocks=blocks, objective=lp.LatencyBudget(speedup=1.25))
    assert made.met
    assert set(made.schedule.reducing) <= allowed
    assert made.schedule.total_removed
    assert all(set(c.schedule.reducing) <= allowed for c in made.front)


def test_a_method_before_block_0_is_planned_like_any_other():
    made = planned(methods="vwt-intra", blocks=0.25, objective=lp.LatencyBudget(speedup=1.5))
    assert made.met
    assert set(made.schedule.reducing) == {0}
    assert made.method == "vwt-intra"


STRAIGHT = {count: 1.0 + 0.1 * count for count in range(3, 18)}


def known_profile(latency, spread=0.001, **kwargs):
    """A profile of POMT at block 1 from {tokens: milliseconds}, as if it had been measured on another device."""
    tokens = tuple(sorted(latency))
    spreads = spread if isinstance(spread, tuple) else (spread,) * len(tokens)
    columns = (tokens, tuple(latency[count] for count in tokens), spreads, (9,) * len(tokens))
    values = {"method": "pomt", "block": 1, "depth": DEPTH, "context": {"device": "Abacus", "batch_size": 2}}
    return lp.LatencyProfile(*columns, **{**values, **kwargs})


ACCURACIES = {
    "concave": lambda count: 1 - (1 - count / N) ** 2,
    "steep": lambda count: 1 / (1 + np.exp(-(count - 9.0))) / (1 / (1 + np.exp(-8.0))),
    "linear": lambda count: 0.5 + 0.5 * count / N,
}


@pytest.fixture
def elsewhere(monkeypatch):
    """Plans POMT at block 1 on a profile of another device, with a proxy that is known."""

    def plan(latency, accuracy, objective, **kwargs):
        asked = []

        def measure(self, reduction, schedule):
            asked.append(N - schedule.total_removed)
            return Estimate(float(accuracy(N - schedule.total_removed)), 0.0)

        monkeypatch.setattr(Measurements, "accuracy", measure)
        profile = known_profile(latency, **kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return planned(methods="pomt", blocks=1, profile=profile, objective=objective), asked

    return plan


@pytest.mark.parametrize("accuracy", ACCURACIES.values(), ids=ACCURACIES)
@pytest.mark.parametrize("objective", [lp.Utility(0.5), lp.Utility(0.2), lp.AccuracyBudget(0.05)], ids=str)
@pytest.mark.parametrize("cliff", [None, 8, 12])
def test_one_block_finds_what_an_exhaustive_search_finds(elsewhere, accuracy, objective, cliff):
    latency = {c: ms + (1.0 if cliff is not None and c > cliff else 0.0) for c, ms in STRAIGHT.items()}
    made, asked = elsewhere(latency, accuracy, objective)
    counts = sorted(latency)
    columns = np.array([latency[c] for c in counts]), np.array([accuracy(c) for c in counts])
    scores = dict(zip(counts, objective.score(*columns), strict=True))
    assert scores[made.tokens] >= max(scores.values()) - 0.002
    assert made.schedule.reducing.keys() <= {1}
    assert made.predicted_ratio == pytest.approx(latency[made.tokens] / latency[N])
    assert made.accuracy == accuracy(made.tokens)
    assert len(asked) == len(set(asked)) < len(latency) - 1


def test_a_flat_curve_removes_nothing_and_says_why(elsewhere):
    flat = dict.fromkeys(range(3, 18), 5.0)
    made, asked = elsewhere(flat, ACCURACIES["linear"], lp.Utility(1.0))
    assert (made.total_removed, made.tokens, made.speedup, made.met) == (0, N, 1.0, True)
    assert "The curve is flat" in made.reason
    assert "Nothing was timed here: the profile is of Abacus." in made.reason
    assert asked == []  # no accuracy is measured for nothing
    missed, _ = elsewhere(flat, ACCURACIES["linear"], lp.LatencyBudget(speedup=1.5))
    assert not missed.met
    assert "The latency budget, 1.5x is not met." in missed.reason
    already = elsewhere(flat, ACCURACIES["linear"], lp.LatencyBudget(ms=5.0))[0]
    assert already.met
    assert already.reason.startswith("The dense model meets the latency budget, 5 ms, already: it takes 5 ms.")
    assert "already" not in made.reason + missed.reason
    tail = elsewhere(flat, ACCURACIES["linear"], lp.LatencyBudget(ms=5.0, percentile=90))[0]
    assert "already: it takes 5 ms at the median." in tail.reason  # whose tail nobody has timed


def test_noise_is_no_reason_to_prune_and_no_flat_curve(elsewhere):
    made, _ = elsewhere(STRAIGHT, ACCURACIES["linear"], lp.Utility(), spread=5.0)
    assert made.total_removed == 0
    assert "too noisy to choose by: 3 tokens seem 51.9% faster than dense, within a noise of" in made.reason


def test_a_budget_that_allows_no_loss(elsewhere):
    lossless, _ = elsewhere(STRAIGHT, lambda count: 1.0 - 1e-7 if count > 11 else 0.9, lp.AccuracyBudget(0))
    assert lossless.tokens == 12
    dense, _ = elsewhere(STRAIGHT, lambda count: 0.999, lp.AccuracyBudget(0))
    assert dense.total_removed == 0
    assert "at most 0% lost): every faster schedule costs too much" in dense.reason


def test_a_plateau_is_not_pruned_for_nothing(elsewhere):
    """Under a budget that allows it all, pruning stops where it stops to save."""
    made, _ = elsewhere({c: 10.0 if c > 8 else 5.0 for c in range(3, 18)}, ACCURACIES["linear"], lp.AccuracyBudget(0.9))
    assert made.tokens == 8


def test_a_given_profile_is_planned_on_and_not_measured_again(monkeypatch):
    model = vit()
    profile = lp.profile_latency(model, IMAGES[:2], method=lp.profiling.TOKEN_CURVE, time_limit=1, verbose=False)
    monkeypatch.setattr("lightning_prune.planning.api.profile_latency", None)
    made = planned(model, methods="topk", profile=profile, objective=lp.LatencyBudget(speedup=1.5))
    assert made.profile is profile
    assert made.met
    assert made.total_removed > 0


@pytest.mark.parametrize(("factor", "warns"), [(1.03, False), (1.3, True), (0.7, True)])
def test_a_given_profile_of_this_device_that_does_not_hold_any_more_is_warned_of(recwarn, factor, warns):
    known = known_profile(STRAIGHT, context={})
    before = replace(known, milliseconds=tuple(factor * DEPTH * N / known.dense_ms * ms for ms in known.milliseconds))
    made = planned(methods="topk", profile=before)
    said = [str(each.message) for each in recwarn if "does not hold any more" in str(each.message)]
    assert len(said) == warns
    assert all(f"{factor * DEPTH * N:.3g} (" in line and f"{DEPTH * N} (± 0) ms now" in line for line in said)
    assert made.profile is before


class NotFinite(Reduction):
    """Divides by nothing."""

    name = "not-finite"

    def reduce(self, sequence, remove):
        found = resolve("random").reduce(sequence, remove)
        return found._replace(tokens=found.tokens / torch.zeros(()))

    def max_removed(self, tokens, num_prefix_tokens):
        return tokens - num_prefix_tokens - 1


def test_a_method_whose_outputs_are_not_finite_is_left_out_with_the_reason():
    made = planned(methods=[NotFinite(), "topk"], objective=lp.AccuracyBudget(0.5))
    assert str(made.method) == "topk"
    assert {candidate.method for candidate in made.front} == {"topk"}
    assert "Left out, not-finite: The model's outputs are not finite" in made.reason
    assert "lack of time" not in made.reason
    with pytest.raises(lp.DataError, match="outputs are not finite"):
        planned(methods=[NotFinite()])
    model = vit()
    model.head.bias.data[0] = float("nan")
    with pytest.raises(lp.DataError, match="outputs are not finite"):
        planned(model, methods=["topk", "random"])


def test_figures_of_a_plan_that_removes_nothing_are_of_the_dense_model_as_it_was_timed():
    """A machine that is faster than when the profile was measured: the reason and `dense_ms` speak of the same."""
    model = vit()
    profile = lp.profile_latency(model, IMAGES[:2], method=lp.profiling.TOKEN_CURVE, time_limit=1, verbose=False)
    before = replace(profile, milliseconds=tuple(1.4 * ms for ms in profile.milliseconds), low_ms=(), high_ms=())
    missed = planned(model, methods="topk", profile=before, objective=lp.LatencyBudget(speedup=50))
    assert (missed.total_removed, missed.met) == (0, False)
    assert missed.dense_ms == missed.latency_ms == pytest.approx(DEPTH * N)
    takes, ratio = re.search(r"predicted to take ([\d.]+) ms, ([\d.]+)x", missed.reason).groups()
    assert float(takes) * float(ratio) == pytest.approx(missed.dense_ms, rel=0.01)
    met = planned(model, methods="topk", profile=before, objective=lp.LatencyBudget(ms=1.2 * DEPTH * N))
    assert f"already: it takes {DEPTH * N} ms." in met.reason


def test_a_profile_from_elsewhere_is_used_and_said():
    context = {"device": "Abacus", "batch_size": 64, "precision": "float16"}
    with pytest.warns(UserWarning, match="measured elsewhere: .* there") as caught:
        made = planned(methods="pomt", profile=known_profile(STRAIGHT, context=context))
    text = " ".join(str(warning.message) for warning in caught)
    assert "device Abacus there" in text
    assert "batch_size 64 there, 2 here" in text
    assert "precision float16 there, float32 here" in text
    assert made.pruned is None
    differing = "batch_size 64 there, 2 here; precision float16 there, float32 here"
    assert f"the profile is of Abacus ({differing})." in made.reason


def test_a_profile_of_a_bundle_is_never_timed_here_and_only_its_images_are_worth_a_warning(recwarn):
    """Also where the name of the device is the same, which is then not what differs."""
    here = measurement_context(vit(), IMAGES[:2])
    context = {**here, "runtime": "onnxruntime", "threads": 99, "clock": "wall", "bundle": "abc"}
    made = planned(methods="pomt", profile=known_profile(STRAIGHT, context=context))
    assert made.pruned is None
    assert f"the profile is of {here['device']}" not in made.reason
    for difference in ("measured by a bundle", "threads 99 there", "runtime onnxruntime there, torch here"):
        assert difference in made.reason
    assert not [each for each in recwarn if "measured elsewhere" in str(each.message)]
    with pytest.warns(UserWarning, match="measured elsewhere: image_shape"):
        planned(methods="pomt", profile=known_profile(STRAIGHT, context={**context, "image_shape": [3, 64, 64]}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "fast"}, r"`objective` must be an Objective .*, got 'fast'"),
        ({"time_limit": -1}, "`time_limit` must be a number > 0, got -1"),
        ({"time_limit": True}, "`time_limit` must be a number > 0, got True"),
        ({"methods": []}, "`methods` must be .*, got an empty list"),
        ({"methods": ["tomee"]}, "Did you mean 'tome'"),
        ({"methods": ["topk", "tome", "topk"]}, r"`methods` must differ from one another, got TopK\(\) twice"),
        ({"blocks": []}, r'`blocks` must be "all", a block, or a list of at least one, got \[\]'),
        ({"blocks": "some"}, "`blocks` must be .*, got 'some'"),
        ({"blocks": [0, 4]}, "`block` must be an index from 0 to 3 .*, got 4"),
        ({"runtime": "abacus"}, "`runtime` must be .*, got 'abacus'"),
        ({"use_cache": 1}, "`use_cache` must be True or False, got 1"),
        ({"cache_dir": 3}, "`cache_dir` must be a folder or None, got 3"),
        ({"proxy": "guess"}, "`proxy` must be 'auto', .*got 'guess'"),
        ({"calibration": [1, 2]}, "`calibration` must be images .*, got list"),
        ({"example_inputs": IMAGES[0]}, r"`example_inputs` must be images \(B, .*\), got \(3, 32, 32\)"),
        (
            {"example_inputs": torch.randn(2, 3, 64, 64)},
            r"`calibration` must be of the size of `example_inputs`, \(3, 64, 64\), got \(3, 32, 32\)",
        ),
        ({"profile": "profile.json"}, "`profile` must be a LatencyProfile, got 'profile.json'"),
        ({"profile": known_profile(STRAIGHT, depth=5)}, r"`profile` must be of this model \(blocks: 4\), .*blocks: 5"),
        ({"profile": known_profile(STRAIGHT | {20: 5.0})}, r"`profile` must be of this model \(tokens: 17\), .*: 20"),
        ({"profile": known_profile(STRAIGHT, context={"parameters": 7})}, r"`profile` must be .* \(parameters: 7\)"),
        ({"profile": known_profile(STRAIGHT, method="tome")}, "`profile` must be .* in one block, got one of tome"),
        ({"profile": known_profile(STRAIGHT, protocol="paper")}, "`profile` must be .*'deployed', got 'paper'"),
        ({"protocol": "paper", "methods": "pomt", "blocks": 1}, "`labels` must be given with protocol='paper'"),
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

    def max_removed(self, tokens, num_prefix_tokens):
        return tokens - num_prefix_tokens - 1

    def reduce(self, sequence, remove):
        raise AssertionError("planning must refuse the method before it reduces anything")


def test_a_method_without_a_hash_is_refused_at_once():
    with pytest.raises(lp.ArgumentError, match=r"`methods` must be hashable, got Value\(\): unhashable type"):
        planned(methods=[Value()])


def test_a_patched_model_is_not_planned_for():
    model = vit()
    with lp.patch(model, "pomt", [0, 4, 0, 0]) as handle:
        with pytest.raises(lp.ArgumentError, match="`model` must be dense, got a patched model"):
            lp.plan(model, IMAGES[:2], **OPTIONS)
        assert handle.active


def test_a_method_of_a_third_party_is_planned_like_any_other():
    class Last(Reduction):
        name = "last"

        def max_removed(self, tokens, num_prefix_tokens):
            return tokens - num_prefix_tokens - 1

        def reduce(self, sequence, remove):
            left = sequence.tokens.shape[1] - remove
            positions = torch.arange(left).expand(len(sequence.tokens), left)
            return lp.reduction.base.ReductionOutput(sequence.tokens[:, :left], positions)

    assert planned(methods=Last(), objective=lp.LatencyBudget(speedup=1.5)).method == "last"


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
def test_everything_is_as_before_also_if_planning_fails(fails_at):
    model = vit(drop_rate=0.3).train()
    model.blocks[1].eval()
    passes = []

    def interrupt(*_):
        passes.append(None)
        if len(passes) - 1 == fails_at:
            raise KeyboardInterrupt

    stop = before_forward(model.blocks[3].mlp, interrupt)
    before = state(model)
    with pytest.raises(KeyboardInterrupt) if fails_at is not None else nullcontext():
        lp.plan(model, IMAGES[:2], methods="topk", **OPTIONS)
    assert state(model) == before
    assert fails_at is None or len(passes) == fails_at + 1
    stop()


def test_a_cut_after_the_mlp_is_said_once(caplog):
    class Odd(Block):
        """Of no known form."""

        def forward(self, x):
            return x + self.mlp(self.norm2(x + self.attn(self.norm1(x))))

    planned(vit(block_fn=Odd), methods=["topk", "tome"], objective=lp.Utility(0.9))
    assert sum("is cut after its MLP" in message for message in caplog.messages) == 1


def test_a_model_that_gains_nothing_stays_dense(monkeypatch):
    monkeypatch.setattr(InterleavedTimer, "once", lambda self, alternative: (self.prepare(alternative), 0.01)[1])
    made = planned(methods="topk")
    assert made.total_removed == 0
    assert made.speedup == 1.0
    assert [c.is_dense for c in made.front] == [True]


def test_plan_as_plain_values(tmp_path):
    made = planned(methods="topk", objective=lp.LatencyBudget(speedup=1.5))
    document = json.loads(json.dumps(made.to_dict()))
    assert document["method"] == "topk"
    assert document["met"] is True
    assert (document["images"], document["sensitivity_images"]) == (24, 24)
    assert len(document["front"]) == len(made.front)
    assert document["front"][0]["removed"] == [0] * DEPTH
    assert np.isfinite(document["speedup"])
    path = made.save(tmp_path / "schedule.yaml")
    assert lp.Schedule.load(path) == made.schedule
    assert yaml.safe_load(path.read_text())["made_on"]["objective"] == "latency budget, 1.5x"


def test_a_method_that_misses_the_budget_does_not_beat_one_that_meets_it(clock):
    probes = []
    clock["topk"] = lambda schedule: probes.append(schedule) or (1.0 if len(probes) <= 16 else 9.0)
    made = planned(methods=["tome", "topk"], objective=lp.LatencyBudget(speedup=1.5))
    assert made.method == "tome"
    assert made.met
    assert made.pruned.ratio <= 1.005 / 1.5


def test_a_method_whose_blocks_do_not_add_up_meets_the_budget_in_the_end(clock):
    """Each further reducing block makes all slower, which no overhead explains: timings must correct it."""
    clock["topk"] = lambda schedule: 1.12 ** (len(schedule.reducing) - 1)
    made = planned(methods="topk", objective=lp.LatencyBudget(speedup=1.5))
    assert made.met
    assert made.pruned.ratio <= 1.005 / 1.5
    one_block = [c for c in made.front if len(c.schedule.reducing) == 1 and milliseconds(c.schedule) <= DEPTH * N / 1.5]
    measured = [c.accuracy for c in one_block if c.accuracy is not None]
    assert made.accuracy >= max(measured, default=0.0) - 0.002


def test_two_configurations_of_a_method_are_two_methods():
    methods = [ToMe(), ToMe(proportional_attention=False), "topk"]
    made = planned(methods=methods, objective=lp.LatencyBudget(speedup=1.3))
    names = {"tome (proportional_attention=True)", "tome (proportional_attention=False)", "topk"}
    assert {candidate.method for candidate in made.front} == {*names, "mixed"}
    one = planned(methods=methods, objective=lp.LatencyBudget(speedup=1.3), blocks=1)
    assert one.label in {candidate.method for candidate in one.front} == names
    assert lp.reduction.resolve(one.method) == one.reduction
    assert made.schedule.methods.keys() == made.schedule.reducing.keys()


def test_a_schedule_that_is_not_faster_in_the_end_is_not_deployed():
    made = planned(methods="topk", objective=lp.LatencyBudget(speedup=1.5))
    slow = replace(made.pruned, ratio=0.99, milliseconds=0.99 * made.dense_ms)
    dense = replace(made, pruned=slow).or_dense_if_slower()
    assert (dense.total_removed, dense.speedup, dense.predicted_ratio, dense.met) == (0, 1.0, 1.0, False)
    assert "takes 99.0% of its latency: nothing is gained" in dense.reason
    assert dense.dense_ms == dense.latency_ms == made.dense_ms
    assert dense.tokens == N
    assert made.or_dense_if_slower() is made
    missed = "The latency budget, 1.5x is not met: the dense model is the best that can be had."
    assert finished(replace(made, pruned=slow), 1.0).reason == f"{dense.reason} {missed}"
    assert finished(made, 1.0) == replace(made, seconds=1.0)


def test_the_prediction_is_a_share_of_dense():
    """If the machine runs at half its speed when the schedule is timed, the ratio is what was predicted."""
    made = planned(methods="topk", objective=lp.LatencyBudget(speedup=1.5))
    half = replace(made, dense=LatencyStats(2 * made.dense_ms, 0.1, 1.0, 0.0, 31))
    assert half.predicted_ms == pytest.approx(2 * made.predicted_ms)


@pytest.mark.parametrize("time_limit", [30.0, 60.0, 240.0])
def test_profile_probes_sensitivity_proxies_and_timings_fit_into_the_time_limit(time_limit):
    """A block takes a millisecond for each token of a batch, in whatever measurement it runs."""
    model = vit()
    clock = TokenClock(model.blocks)
    made = lp.plan(model, IMAGES[:2], calibration=IMAGES, time_limit=time_limit, verbose=False, clock=clock)
    assert made.seconds == pytest.approx(clock.now)
    assert clock.now <= time_limit
    assert made.pruned is not None  # timed against dense


class SlowClock:
    """A clock that only advances when a measurement is made."""

    def __init__(self, monkeypatch, sensitivity=0.0, proxy=0.0, timing=0.0):
        self.now, self.images, self.proxies, self.timings = 0.0, Counter(), 0, 0
        add, accuracy, time_candidates = Sensitivity.add, Measurements.accuracy, Measurements.time_candidates

        def slow_add(table, images, *more):
            self.images[table._reduction.name] += len(images)
            self.now += sensitivity * len(images)
            return add(table, images, *more)

        def slow_accuracy(measured, reduction, schedule):
            self.now += proxy
            self.proxies += 1
            return accuracy(measured, reduction, schedule)

        def slow_timing(measured, candidates):
            self.now += timing
            self.timings += 1
            return time_candidates(measured, candidates)

        monkeypatch.setattr(Sensitivity, "add", slow_add)
        monkeypatch.setattr(Measurements, "accuracy", slow_accuracy)
        monkeypatch.setattr(Measurements, "time_candidates", slow_timing)

    def __call__(self):
        return self.now


def test_all_methods_see_the_same_images_and_the_plan_says_how_many(monkeypatch):
    clock = SlowClock(monkeypatch, sensitivity=0.1)
    many = IMAGES.repeat(4, 1, 1, 1)
    made = planned(calibration=many, methods=["tome", "topk"], time_limit=20, clock=clock)
    assert set(clock.images) == {"tome", "topk"}
    assert set(clock.images.values()) == {made.sensitivity_images}
    assert 8 <= made.sensitivity_images < len(many)
    assert made.sensitivity_seconds == pytest.approx(0.2 * made.sensitivity_images)
    assert clock.now < 20


@pytest.mark.parametrize("proxy", ["soft_agreement", "cosine"])
def test_images_of_whose_class_the_model_is_unsure_come_first(monkeypatch, proxy):
    """The sizes of all are 1 in the mean, so that the mean divergence is that of all images in the end."""
    model, seen, sizes = vit(), [], []
    add = Sensitivity.add

    def noted(table, images, on_step, dense, counted=None):
        seen.append(images)
        sizes.append(counted)
        return add(table, images, on_step, dense, counted)

    monkeypatch.setattr(Sensitivity, "add", noted)
    made = planned(model, methods="topk", proxy=proxy, time_limit=None)
    with torch.no_grad():
        probabilities = model(torch.cat(seen)).softmax(-1)
    unsure = 1 - probabilities.square().sum(-1)
    assert made.sensitivity_images == len(unsure) == len(IMAGES)
    if proxy == "cosine":
        assert set(sizes) == {None}
        return
    assert torch.equal(unsure.argsort(descending=True, stable=True), torch.arange(len(unsure)))
    assert torch.allclose(torch.cat(sizes).float(), unsure / unsure.mean(), rtol=1e-3)
    assert float(torch.cat(sizes).mean()) == pytest.approx(1.0)


def test_a_method_that_is_surely_worse_leaves_its_images_to_the_others_and_is_named(monkeypatch):
    looks = []

    def worse(measured, levels, objectives):
        looks.append({label: len(method.without) for label, method in measured.items()})
        assert levels[-1] == N
        assert objectives == [lp.LatencyBudget(speedup=1.5)]
        return {"topk": ("tome", "pomt")} if len(looks) == 2 else {}

    monkeypatch.setattr(measurements, "dominated_methods", worse)
    clock = SlowClock(monkeypatch)
    options = {"calibration": IMAGES.repeat(6, 1, 1, 1), "methods": ["tome", "topk", "pomt"], "clock": clock}
    made = planned(objective=lp.LatencyBudget(speedup=1.5), time_limit=None, **options)
    assert looks[:2] == [dict.fromkeys(("tome", "topk", "pomt"), groups) for groups in (4, 8)]
    assert looks[2].keys() == {"tome", "pomt"}
    assert clock.images == {"tome": 144, "pomt": 144, "topk": 32}
    assert made.sensitivity_images == 144
    assert "topk" not in {candidate.method for candidate in made.front}
    assert "Left out after 32 images, topk: surely worse than tome and pomt." in made.reason
    assert "lack of time" not in made.reason


@pytest.mark.parametrize(("slow", "time_limit"), [("sensitivity", 40), ("proxy", 30), ("timing", 25)])
def test_the_time_limit_is_a_total_and_the_best_timed_candidate_is_taken(monkeypatch, slow, time_limit):
    clock = SlowClock(monkeypatch, **{slow: 1.0 if slow == "sensitivity" else 8.0})
    made = planned(objective=lp.LatencyBudget(speedup=1.5), time_limit=time_limit, clock=clock)
    assert clock.now <= 1.1 * time_limit
    assert clock.timings >= 1
    assert made.pruned is not None
    assert made.met
    assert made.seconds == clock.now
    assert made.front[0].method == "tome"  # the preferred method is always searched


def test_methods_that_there_is_no_time_for_are_named(monkeypatch):
    clock = SlowClock(monkeypatch, sensitivity=100.0)
    made = planned(methods=["topk", "tome", "pomt"], objective=lp.LatencyBudget(speedup=1.5), clock=clock)
    assert made.met
    assert {candidate.method for candidate in made.front} == {"topk"}
    assert clock.images.keys() == {"topk"}
    assert made.reason.endswith("Not searched for lack of time: tome, pomt.")


@pytest.mark.parametrize(("pass_seconds", "searched"), [(1e-3, 3), (0.035, 2), (0.1, 1), (10.0, 1)])
def test_no_method_is_begun_that_there_is_no_time_for(monkeypatch, pass_seconds, searched):
    """Before anything is probed: the least work of a method follows from one pass of the dense model."""
    begun = []
    probes = Measurements._time_probes
    monkeypatch.setattr(
        Measurements,
        "_time_probes",
        lambda self, methods, *more: begun.append([*methods]) or probes(self, methods, *more),
    )

    def limit_images(self, methods):
        self._seconds_per_image = pass_seconds  # of one image

    monkeypatch.setattr(Measurements, "_limit_images", limit_images)
    made = planned(methods=["tome", "topk", "pomt"], time_limit=8, clock=SlowClock(monkeypatch))
    # Each method takes 11 passes for the sensitivity (1 + 4 counts * 2.5 blocks) and 2 * 24 for proxies, and 12 runs.
    assert begun == [["tome", "topk", "pomt"][:searched]]
    assert ("Not searched for lack of time" in made.reason) == (searched < 3)


def test_probes_are_as_many_as_are_counted_on():
    assert {len(probe_schedules(resolve("tome"), N, 1, blocks, DEPTH)) for blocks in ([0], [1, 3], range(4))} == {
        PROBES
    }


@pytest.mark.long
def test_a_runtime_is_applied_while_planning_and_undone(monkeypatch):
    """By a backend that takes no minutes: graphs of inductor are run in the tests of the runtimes."""

    def compile_eagerly(self, mode=None, **kwargs):
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager", **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    model = vit()
    made = planned(model, methods="topk", runtime="torch.compile:mode=blocks", time_limit=5)
    assert made.profile.context["runtime"] == "torch.compile:mode=blocks"
    assert not any(module._compiled_call_impl for module in model.modules())


class Silent(Reduction):
    """Does not say in its settings what distinguishes it."""

    name = "silent"

    def __init__(self, secret):
        self.secret = secret

    def max_removed(self, tokens, prefix_tokens):
        return 1

    def reduce(self, sequence, remove):
        raise AssertionError("labels are made without reducing anything")

    def settings(self):
        return {}


def test_methods_are_labelled_by_name_and_what_differs():
    assert list(method_labels([ToMe(), resolve("pomt"), resolve("pomt-nearest")]).values()) == [
        "tome",
        "pomt",
        "pomt-nearest",
    ]
    labels = method_labels([Silent(1), resolve("topk"), Silent(2), Silent(3)])
    assert list(labels.values()) == ["silent", "topk", "silent #2", "silent #3"]


@pytest.mark.parametrize(
    ("outputs", "proxy", "label"),
    [
        (1, "auto", "R2"),
        (3, "r2", "R2"),
        (3, "tag_agreement", "tag agreement"),
        (3, "cosine", "cosine similarity of features"),
    ],
)
def test_an_accuracy_budget_holds_by_the_proxy_that_fits_the_outputs(outputs, proxy, label):
    model = vit(num_classes=outputs)
    options = {"proxy": proxy, "methods": ["tome", "random"]}
    made = planned(model, objective=lp.AccuracyBudget(0.2), **options)
    agreement = next(kind.agreement for kind in OUTPUT_KINDS.values() if kind.label == label)
    dense = model(IMAGES).detach()
    with lp.patch(model, made):
        kept = agreement(dense, model(IMAGES).detach())
    assert made.total_removed > 0
    assert (made.proxy, made.accuracy) == (label, pytest.approx(kept, abs=1e-4))
    assert kept >= 0.8
    nothing_lost = planned(model, objective=lp.AccuracyBudget(0), **options)
    with lp.patch(model, nothing_lost):
        assert agreement(dense, model(IMAGES).detach()) >= 1 - 1e-5


def test_no_plan_is_made_where_the_outputs_say_nothing():
    model = vit(num_classes=1)
    torch.nn.init.zeros_(model.head.weight)
    with pytest.raises(lp.DataError, match="all 24 calibration images the same numbers"):
        planned(model)
