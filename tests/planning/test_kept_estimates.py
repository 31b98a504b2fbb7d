"""What accuracy planning has estimated once, it does not estimate again: forward passes are counted."""

import warnings

import pytest
import torch
from timm.layers import PatchEmbed

import lightning_prune as lp
from helpers.data import noise_images
from lightning_prune.planning import measurements
from lightning_prune.planning.sensitivity import Sensitivity
from lightning_prune.profiling import soft_agreement

from .clocked import IMAGES, planned, vit

pytestmark = pytest.mark.usefixtures("clock")
BUDGET = lp.LatencyBudget(speedup=1.5)
LOOK = 8  # images with which the dense model is compared with that of an earlier run


@pytest.fixture
def passes(monkeypatch):
    """Images in each forward pass over calibration images; those of the two example inputs are left out."""
    sizes, forward = [], PatchEmbed.forward

    def counted(self, x):
        if len(x) > 2:
            sizes.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(PatchEmbed, "forward", counted)
    return sizes


def passes_of(passes, *args, **kwargs):
    """A plan, and the passes that it took."""
    passes.clear()
    made = planned(*args, **{"methods": "topk", "objective": BUDGET, **kwargs})
    return made, list(passes)


@pytest.mark.parametrize("time_limit", [20, None])
def test_a_second_plan_of_the_same_model_and_images_runs_no_pass_for_what_is_known(passes, time_limit):
    first, counted = passes_of(passes, time_limit=time_limit)
    again, recounted = passes_of(passes, time_limit=time_limit)
    assert sum(counted) > 10 * len(IMAGES)
    assert recounted == [LOOK, LOOK]
    for name in ("schedule", "method", "accuracy", "images", "sensitivity_images", "proxy"):
        assert getattr(again, name) == getattr(first, name)
    assert [c.accuracy for c in again.front] == [c.accuracy for c in first.front]
    assert [c.cost for c in again.front] == pytest.approx([c.cost for c in first.front])


def test_other_weights_are_estimated_anew(passes):
    model = vit()
    _, counted = passes_of(passes, model)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] += 1e-3
    _, recounted = passes_of(passes, model)
    assert sum(recounted) > 0.5 * sum(counted)
    _, without = passes_of(passes, model, use_cache=False)
    assert sum(without) > 0.5 * sum(counted)


def test_what_another_objective_needs_besides_is_measured(passes):
    _, counted = passes_of(passes)
    made, recounted = passes_of(passes, objective=lp.AccuracyBudget(0.1))
    assert LOOK < sum(recounted) < 0.5 * sum(counted)
    with torch.no_grad(), lp.patch(model := vit(), made):
        kept = soft_agreement(vit()(IMAGES), model(IMAGES))
    assert made.accuracy == pytest.approx(kept, abs=1e-5)


def test_what_runs_without_the_cache_leaves_nothing(tmp_path, passes):
    planned(methods="topk", use_cache=False, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    planned(methods="topk", cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_an_interrupted_plan_keeps_what_it_knew(passes, monkeypatch):
    taken = []
    real = measurements.Measurements.time_candidates

    def interrupted(self, candidates):
        taken.append(candidates)
        raise KeyboardInterrupt

    monkeypatch.setattr(measurements.Measurements, "time_candidates", interrupted)
    with pytest.raises(KeyboardInterrupt):
        passes_of(passes)
    counted = list(passes)
    monkeypatch.setattr(measurements.Measurements, "time_candidates", real)
    _, recounted = passes_of(passes)
    assert taken
    assert sum(recounted) < 0.3 * sum(counted)


def test_code_that_changes_under_the_same_structure_is_noticed(passes, monkeypatch):
    """A function that the model calls may have been edited between two runs: the first outputs tell."""
    _, counted = passes_of(passes)
    pool = type(vit()).pool
    monkeypatch.setattr(type(vit()), "pool", lambda self, x, *args: -pool(self, x, *args))
    _, recounted = passes_of(passes)
    assert sum(recounted) > 0.5 * sum(counted)
    _, again = passes_of(passes)  # and the new ones are kept in their place
    assert again == [LOOK, LOOK]


@pytest.mark.parametrize("what", ["hooks", "replaced_methods"])
def test_what_cannot_be_compared_is_not_kept_and_said_once(tmp_path, passes, what):
    model = vit()
    if what == "hooks":
        model.blocks[1].register_forward_hook(lambda *_: None)
    else:
        model.blocks[1].mlp.forward = model.blocks[1].mlp.forward  # as a wrapper would
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        planned(model, methods="topk", cache_dir=tmp_path)
    lines = [str(each.message) for each in told if "not kept" in str(each.message)]
    assert len(lines) == 1
    assert f"{what} cannot be compared" in lines[0]
    assert not list(tmp_path.iterdir())


class Limited:
    """A clock on which a calibration image takes a given time in a pass, and a batch of a sensitivity as given."""

    def __init__(self, monkeypatch, image):
        self.now, self.image = 0.0, image
        forward = PatchEmbed.forward

        def slow(module, x):
            self.now += self.image * len(x) if len(x) > 2 else 0.0
            return forward(module, x)

        monkeypatch.setattr(PatchEmbed, "forward", slow)

    def __call__(self):
        return self.now


@pytest.mark.parametrize(("factor", "reused"), [(0.6, True), (1.8, True), (2.5, False)])
def test_about_as_many_images_as_before_are_as_good(monkeypatch, factor, reused):
    """The machine is faster or slower at the second time, so that there is time for more images, or for fewer."""
    many = noise_images(400)
    clock = Limited(monkeypatch, 1e-2)
    options = {"methods": "topk", "objective": BUDGET, "calibration": many, "clock": clock, "time_limit": 15}
    first = planned(**options)
    assert 2.5 * 32 < first.images < 400  # more than the least
    clock.now, clock.image = 0.0, 1e-2 * factor
    added = []
    monkeypatch.setattr(measurements.AccuracyStore, "keep_estimate", lambda self, *_: added.append(1))
    again = planned(**options)
    assert (again.images == first.images) == reused
    assert reused or again.images == pytest.approx(first.images / factor, rel=0.15)
    assert (not added) == reused


def test_with_much_more_time_a_sensitivity_is_measured_anew(monkeypatch):
    many, added = noise_images(200), []
    clock = Limited(monkeypatch, 1e-2)
    real = Sensitivity.add

    def add(self, images, *more):
        added.append(len(images))
        clock.now += 0.1 * len(images)
        return real(self, images, *more)

    monkeypatch.setattr(Sensitivity, "add", add)
    options = {"methods": "topk", "objective": BUDGET, "calibration": many, "clock": clock}
    images = {}
    for seconds in (20, 30, 60):
        clock.now = 0.0
        before = len(added)
        images[seconds] = planned(time_limit=seconds, **options).sensitivity_images, len(added) - before
    assert images[30] == (images[20][0], 0)
    assert images[60][0] > 2 * images[20][0]
