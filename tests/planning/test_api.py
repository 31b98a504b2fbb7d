"""Planning in one block: what is chosen on profiles and proxies that are known, and on real ones."""

import json

import pytest
import torch
import yaml

import lightning_prune as lp
from helpers.models import tiny_vit
from lightning_prune.patching.class_swap import is_patched_module
from lightning_prune.planning import ProxyCurve
from lightning_prune.profiling import LatencyStats
from lightning_prune.report.plots import plot

from .known import ACCURACIES, IMAGES, STRAIGHT, KnownCurve, best, planned, profile, score


@pytest.mark.parametrize("accuracy", ACCURACIES.values(), ids=ACCURACIES)
@pytest.mark.parametrize("objective", [lp.Utility(0.5), lp.Utility(0.2), lp.AccuracyBudget(0.05)], ids=str)
@pytest.mark.parametrize("cliff", [None, 8, 12])
def test_finds_what_an_exhaustive_search_finds(accuracy, objective, cliff):
    latency = {c: ms + (1.0 if cliff is not None and c > cliff else 0.0) for c, ms in STRAIGHT.items()}
    made, known = planned(latency, accuracy, objective)
    assert score(made.tokens, latency, accuracy, objective) >= best(latency, accuracy, objective) - 0.002
    assert len(known.asked) < len(latency) - 1  # and asks for less


def test_the_deployed_count_is_the_chosen_one_and_both_were_measured():
    made, known = planned(STRAIGHT, ACCURACIES["concave"], lp.Utility(0.5))
    assert made.schedule.tokens(17)[-1] == made.tokens
    assert made.tokens in known.values
    assert made.predicted_ms == pytest.approx(STRAIGHT[made.tokens])
    assert made.schedule.reducing == {1: 17 - made.tokens}


def test_a_flat_curve_removes_nothing_and_says_why():
    made, known = planned(dict.fromkeys(range(3, 18), 5.0), ACCURACIES["linear"], lp.Utility(1.0))
    assert made.removed == 0
    assert made.tokens == 17
    assert "The curve is flat" in made.reason
    assert known.asked == []  # no accuracy is measured for nothing
    assert made.speedup == 1.0


def test_noise_is_no_reason_to_prune_and_no_flat_curve():
    curve = profile(STRAIGHT, spread=5.0)
    made = lp.plan(tiny_vit(), IMAGES, profile=curve, block=1, confirm=False, progress=False)
    assert made.removed == 0
    assert "too noisy to choose by: 3 tokens seem 51.9% faster than dense, within a noise of" in made.reason


def test_a_budget_that_only_noise_reaches_is_not_met_and_says_why():
    curve = profile(STRAIGHT, spread=(8.0,) * 3 + (0.001,) * 12)  # of 3, 4 and 5 tokens
    known = KnownCurve(curve, ACCURACIES["linear"])
    shared = {"profile": curve, "curve": known, "block": 1, "confirm": False, "progress": False}
    made = lp.plan(tiny_vit(), IMAGES, objective=lp.LatencyBudget(speedup=2), **shared)
    assert made.removed == 0
    assert "too noisy to choose by: 3 tokens seem 51.9% faster than dense" in made.reason
    assert made.reason.endswith("The latency budget, 2x is not met.")
    assert lp.plan(tiny_vit(), IMAGES, objective=lp.LatencyBudget(speedup=1.6), **shared).removed > 0


def test_a_flat_curve_says_that_a_budget_is_missed():
    made, _ = planned(dict.fromkeys(range(3, 18), 5.0), ACCURACIES["linear"], lp.LatencyBudget(speedup=1.5))
    assert made.reason.endswith("The latency budget, 1.5x is not met.")
    met, _ = planned(dict.fromkeys(range(3, 18), 5.0), ACCURACIES["linear"], lp.LatencyBudget(ms=5.0))
    assert "not met" not in met.reason


def test_a_budget_that_allows_no_loss():
    lossless, _ = planned(STRAIGHT, lambda count: 1.0 - 1e-7 if count > 11 else 0.9, lp.AccuracyBudget(0))
    assert lossless.tokens == 12
    dense, _ = planned(STRAIGHT, lambda count: 0.999, lp.AccuracyBudget(0))
    assert dense.removed == 0
    assert "at most 0% lost): every faster count costs too much" in dense.reason


def test_a_plateau_is_not_pruned_for_nothing():
    """Under a budget that allows it all, pruning stops where it stops to save."""
    latency = {c: 10.0 if c > 8 else 5.0 for c in range(3, 18)}
    made, _ = planned(latency, ACCURACIES["linear"], lp.AccuracyBudget(0.9))
    assert made.tokens == 8


def test_a_budget_that_nothing_meets_keeps_dense():
    made, _ = planned(STRAIGHT, lambda count: 0.5, lp.AccuracyBudget(0.01))
    assert made.removed == 0
    assert "every faster count costs too much" in made.reason


def test_real_model_end_to_end():
    model = tiny_vit()
    made = lp.plan(model, IMAGES, example_inputs=IMAGES[:2], objective=lp.Utility(1.0), time_limit=0.5, progress=False)
    assert made.proxy == "soft agreement"
    assert made.block == 1
    assert made.schedule.made_on.dense_tokens == 17
    assert made.schedule.made_on.batch_size == 2
    if made.removed:  # the device decides
        assert made.pruned.rounds == made.dense.rounds
        assert made.latency_ms == made.pruned.milliseconds
    assert not any(map(is_patched_module, model.modules()))


def test_proxy_curve_is_that_of_the_deployed_cut():
    model, curve = tiny_vit(), profile(STRAIGHT)
    values = ProxyCurve(model, IMAGES, curve, progress=False)
    dense = model(IMAGES).softmax(-1)
    top = dense.argmax(-1, keepdim=True)
    with lp.patch(model, "pomt", [0, 8, 0, 0]):
        pruned = model(IMAGES).softmax(-1)
    expected = float(pruned.detach().gather(1, top).mean() / dense.detach().gather(1, top).mean())
    assert values(9) == pytest.approx(expected, rel=1e-5)
    assert not any(map(is_patched_module, model.modules()))


def test_plan_as_plain_values(tmp_path):
    made, _ = planned(STRAIGHT, ACCURACIES["concave"], lp.Utility(0.5))
    json.dumps(made.to_dict())
    path = made.schedule.save(tmp_path / "schedule.yaml")
    assert yaml.safe_load(path.read_text())["made_on"]["objective"] == "utility, alpha 0.5"
    assert lp.Schedule.load(path) == made.schedule
    figure = plot(made, tmp_path / "plan.png")
    assert len(figure.axes) == 3
    assert (tmp_path / "plan.png").stat().st_size > 10_000


@pytest.mark.parametrize("accuracy", ACCURACIES.values(), ids=ACCURACIES)
def test_a_second_objective_on_one_curve_finds_what_it_finds_alone(accuracy):
    """What the first one asked for must not use up what the second one may ask."""
    latency = {count: 1.0 + 0.1 * count for count in range(20, 198)}
    curve = profile(latency)
    model = tiny_vit(img_size=112)  # 197 tokens
    shared = KnownCurve(curve, lambda count: accuracy(17 * count / 197))
    options = {"profile": curve, "block": 1, "confirm": False, "progress": False}
    images = torch.zeros(1, 3, 112, 112)
    alone = lp.plan(
        model, images, curve=KnownCurve(curve, shared.accuracy), objective=lp.AccuracyBudget(0.02), **options
    )
    lp.plan(model, images, curve=shared, objective=lp.Utility(0.5), **options)
    second = lp.plan(model, images, curve=shared, objective=lp.AccuracyBudget(0.02), **options)
    assert curve.latency_ms(second.tokens) <= curve.latency_ms(alone.tokens)
    assert shared(second.tokens) >= 0.98


def test_a_finalist_that_is_not_faster_removes_nothing(monkeypatch):
    slow = LatencyStats(9.9, 0.1, 0.99, 0.01, 31)
    monkeypatch.setattr(
        "lightning_prune.planning.single_block.compare_latency", lambda *_, **__: {"dense": slow, "pruned": slow}
    )
    curve = profile(STRAIGHT)
    made = lp.plan(
        tiny_vit(), IMAGES, profile=curve, curve=KnownCurve(curve, lambda count: 1.0), block=1, progress=False
    )
    assert made.removed == 0
    assert made.tokens == 17
    assert "take 99.0% of dense, against the profile: nothing is gained" in made.reason
    assert made.speedup == 1.0
    assert made.dense_ms == made.latency_ms == 9.9


def test_the_prediction_is_the_share_of_dense_that_the_profile_says(monkeypatch):
    """The machine runs at half its speed when the winner is timed: what is predicted is the ratio, not the clock."""
    half = {"dense": LatencyStats(5.4, 0.1, 1.0, 0.0, 31), "pruned": LatencyStats(2.7, 0.1, 0.5, 0.01, 31)}
    monkeypatch.setattr("lightning_prune.planning.single_block.compare_latency", lambda *_, **__: half)
    curve = profile(STRAIGHT)
    made = lp.plan(
        tiny_vit(), IMAGES, profile=curve, curve=KnownCurve(curve, lambda count: 1.0), block=1, progress=False
    )
    assert made.predicted_ms == pytest.approx(STRAIGHT[made.tokens] / STRAIGHT[17] * 5.4)


def test_a_patched_model_is_not_planned_for():
    model = tiny_vit()
    with lp.patch(model, "pomt", [0, 4, 0, 0]) as handle:
        with pytest.raises(lp.ArgumentError, match="`model` must be dense, got a patched model"):
            lp.plan(model, IMAGES, profile=profile(STRAIGHT), block=1, progress=False)
        assert handle.active


def test_a_profile_from_elsewhere_is_used_and_said():
    foreign = profile(STRAIGHT, context={"device": "Abacus", "batch_size": 64, "precision": "float16"})
    with pytest.warns(UserWarning, match="measured elsewhere: .* there") as said:
        lp.plan(tiny_vit(), IMAGES, profile=foreign, example_inputs=IMAGES[:2], block=1, confirm=False, progress=False)
    text = " ".join(str(warning.message) for warning in said)
    assert "device Abacus there" in text
    assert "batch_size 64 there, 2 here" in text
    assert "precision float16 there, float32 here" in text


def test_the_final_comparison_runs_at_the_profiled_batch_size(monkeypatch):
    seen = []

    def compare(model, batch, variants, **_):
        seen.append(len(batch))
        return dict.fromkeys(variants, LatencyStats(1.0, 0.1, 0.5, 0.01, 31))

    monkeypatch.setattr("lightning_prune.planning.single_block.compare_latency", compare)
    curve = profile(STRAIGHT, context={"batch_size": 40})
    lp.plan(tiny_vit(), IMAGES, profile=curve, curve=KnownCurve(curve, lambda count: 1.0), block=1, progress=False)
    assert seen == [40]


def test_a_curve_on_another_profile():
    curve = KnownCurve(profile(STRAIGHT), lambda count: 1.0)
    with pytest.raises(lp.ArgumentError, match="`curve` is a proxy curve on another profile"):
        lp.plan(tiny_vit(), IMAGES, profile=profile(STRAIGHT | {3: 1.25}), curve=curve, block=1, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`example_inputs` is needed"),
        ({"images": [1, 2]}, "`images` must be a tensor .* got list"),
        ({"objective": 0.5}, "`objective` must be an Objective such as Utility"),
        ({"profile": profile(STRAIGHT, depth=5)}, "5 blocks; this one has 4"),
        ({"profile": profile(STRAIGHT | {20: 5.0})}, "20 tokens; this model has 17"),
        ({"profile": profile(STRAIGHT), "block": 2}, "pomt at block 1; asked for is pomt at block 2"),
        ({"profile": profile(STRAIGHT), "method": "random"}, "pomt at block 1; asked for is random at block 1"),
        ({"profile": profile(STRAIGHT, protocol="paper")}, "protocol 'paper', not 'deployed'"),
        (
            {"profile": profile(STRAIGHT, protocol="paper"), "protocol": "paper"},
            "`labels` are needed by protocol='paper'",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(lp.ArgumentError, match=message):
        lp.plan(tiny_vit(), **{"images": IMAGES, "block": 1, "progress": False, **arguments})
