"""Estimates of accuracy on disk: found again under the same conditions only, whatever happens to the folder."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch

import lightning_prune as lp
from helpers.data import noise_images
from helpers.models import tiny_vit
from lightning_prune._utils import files
from lightning_prune.patching import find_vision_transformer
from lightning_prune.profiling import accuracy_store
from lightning_prune.profiling.accuracy_proxy import Estimate
from lightning_prune.profiling.accuracy_store import AccuracyStore, KeptSensitivity
from lightning_prune.profiling.environment import accuracy_dependencies, unknown_conditions
from lightning_prune.profiling.model_identity import method_identity
from lightning_prune.reduction import Reduction, ToMe, resolve

from .kept import IMAGES, by_us, compiled, hooked

SCHEDULE, TOPK = lp.Schedule([0, 4, 0, 0]), resolve("topk")
OUTPUTS = torch.tensor([[1.0, -2.0, 0.5]])
TABLE = KeptSensitivity([[0.5, 0.0], [0.25, 0.0]], 8, float("inf"))
CONDITIONS = {"weights": "those", "images": "these"}


def conditions(model=None, images=IMAGES, proxy="soft_agreement", example_inputs=IMAGES):
    transformer = find_vision_transformer(tiny_vit() if model is None else model)
    return accuracy_dependencies(transformer, example_inputs, images, proxy)


def opened(folder, outputs=OUTPUTS, depends=CONDITIONS):
    store = AccuracyStore(depends, folder)
    store.check(outputs)
    return store


def filled(folder):
    store = opened(folder)
    store.keep_estimate(TOPK, SCHEDULE, 24, Estimate(0.75, 0.01))
    store.keep_sensitivity(TOPK, [0, 1], [9, 17], TABLE)
    return store


def contents(store):
    return (
        store.estimate(TOPK, SCHEDULE, 24),
        store.sensitivity(TOPK, [0, 1], [9, 17]),
        store.image_counts(),
    )


KNOWN, NOTHING = (Estimate(0.75, 0.01), TABLE, [24]), (None, None, [])


def test_what_is_kept_is_found_again(tmp_path):
    filled(tmp_path / "new")
    assert contents(opened(tmp_path / "new")) == KNOWN
    assert contents(opened(tmp_path / "new", depends={**CONDITIONS, "weights": "others"})) == NOTHING


def test_an_infinite_error_is_kept_as_such(tmp_path):
    opened(tmp_path).keep_estimate(TOPK, SCHEDULE, 1, Estimate(0.75))
    assert opened(tmp_path).estimate(TOPK, SCHEDULE, 1) == Estimate(0.75)


def test_an_estimate_is_of_one_method_one_schedule_and_so_many_images(tmp_path):
    filled(tmp_path)
    store = opened(tmp_path)
    assert store.estimate(resolve("tome"), SCHEDULE, 24) is None
    assert store.estimate(TOPK, lp.Schedule([0, 0, 4, 0]), 24) is None
    assert store.estimate(TOPK, SCHEDULE, 25) is None
    assert store.sensitivity(TOPK, [0, 2], [9, 17]) is None
    assert store.sensitivity(TOPK, [0, 1], [8, 17]) is None


def weights():
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] += 1e-6
    return model


@pytest.mark.parametrize(
    "other",
    [
        {"model": weights()},
        {"model": tiny_vit().bfloat16()},
        {"model": tiny_vit(num_heads=4)},
        {"images": noise_images(2, seed=1)},
        {"images": IMAGES.flip(0)},
        {"proxy": "cosine"},
    ],
    ids=["weights", "precision", "structure", "images", "order", "proxy"],
)
def test_any_other_condition_is_another_key(other):
    assert conditions(**other) != conditions()
    assert not unknown_conditions(conditions(**other))


def test_latency_and_what_runs_it_are_no_conditions():
    """Estimates run without compilation, in batches of their own."""
    assert conditions(by_us("default")) == conditions() == conditions(example_inputs=noise_images(1))


@pytest.mark.parametrize(
    ("build", "condition"), [(compiled, "runtime"), (lambda: hooked("register_forward_hook"), "hooks")]
)
def test_what_the_user_compiled_or_hooked_is_unknown(tmp_path, build, condition):
    depends = conditions(build())
    assert unknown_conditions(depends) == [condition]
    with pytest.warns(UserWarning, match=f"not kept: {condition} cannot be compared"):
        store = AccuracyStore(depends, tmp_path)
    store.check(OUTPUTS)
    store.keep_estimate(TOPK, SCHEDULE, 24, Estimate(0.75))
    assert not list(tmp_path.iterdir())


def test_methods_are_told_apart_by_class_and_settings():
    assert method_identity(ToMe()) == method_identity(resolve("tome"))
    assert method_identity(ToMe()) != method_identity(ToMe(proportional_attention=False))
    assert method_identity(resolve("topk")) != method_identity(resolve("evit"))


class Holding(Reduction):
    """Holds anything."""

    name = "holding"

    def __init__(self, value):
        self.value = value

    def max_removed(self, tokens, num_prefix_tokens):
        return 1

    def reduce(self, sequence, remove):
        raise AssertionError("nothing is run here")


def test_tensors_of_a_method_are_compared_to_the_bit_and_unknown_objects_are_said_once(tmp_path):
    long = torch.zeros(10_000)
    assert method_identity(Holding(long)) == method_identity(Holding(long.clone()))
    assert method_identity(Holding(long)) != method_identity(Holding(long + (torch.arange(10_000) == 5000)))
    store = opened(tmp_path)
    with pytest.warns(UserWarning, match="the settings of holding cannot be compared"):
        store.keep_estimate(Holding(object()), SCHEDULE, 24, Estimate(0.75))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.keep_estimate(Holding(object()), SCHEDULE, 24, Estimate(0.75))
    assert store.estimate(Holding(object()), SCHEDULE, 24) is None


@pytest.mark.parametrize(("change", "holds"), [(0.0, True), (0.01, True), (0.1, False), (float("nan"), False)])
def test_nothing_is_found_where_the_dense_model_says_something_else(tmp_path, change, holds):
    filled(tmp_path)
    store = opened(tmp_path, OUTPUTS + change)
    assert contents(store) == (KNOWN if holds else NOTHING)
    store.keep_estimate(TOPK, SCHEDULE, 30, Estimate(0.5))
    if change == change:  # whatever was of other outputs is replaced
        assert opened(tmp_path, OUTPUTS + change).image_counts() == ([24, 30] if holds else [30])


def test_nothing_is_found_before_the_outputs_are_compared(tmp_path):
    filled(tmp_path)
    assert contents(AccuracyStore(CONDITIONS, tmp_path)) == NOTHING


def test_two_runs_at_once_keep_what_both_know(tmp_path):
    one, other = opened(tmp_path), opened(tmp_path)
    one.keep_estimate(TOPK, SCHEDULE, 24, Estimate(0.75))
    other.keep_estimate(TOPK, SCHEDULE, 32, Estimate(0.5))
    assert opened(tmp_path).image_counts() == [24, 32]


def entries(text, **changes):
    return json.dumps({**json.loads(text), **changes})


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: entries(text, version=99),
        lambda text: entries(text, dependencies={}),
        lambda text: entries(text, format="lightning_prune.schedule"),
        lambda text: entries(text, outputs="x"),
        lambda text: entries(text, outputs=[[1.0]]),
        lambda text: entries(text, entries=3),
        lambda text: entries(text, entries={"not json": 1}),
        lambda text: entries(text, entries={"3": 1}),
        lambda text: entries(text, entries=dict.fromkeys(json.loads(text)["entries"], "x")),
        lambda text: entries(text, entries={key: {"table": 3} for key in json.loads(text)["entries"]}),
    ],
)
def test_a_damaged_file_is_measured_again_and_replaced(tmp_path, damage):
    filled(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(damage(path.read_text()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = opened(tmp_path)
        assert contents(store)[:2] == (None, None)
        store.keep_estimate(TOPK, SCHEDULE, 24, Estimate(0.75, 0.01))
        store.keep_sensitivity(TOPK, [0, 1], [9, 17], TABLE)
    assert contents(opened(tmp_path)) == KNOWN


def test_a_full_disk_is_said_once_and_ends_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.tempfile, "mkstemp", full)
    with pytest.warns(UserWarning, match="No space left on device") as told:
        store = filled(tmp_path)
    assert len(told) == 1
    assert contents(store)[0] == Estimate(0.75, 0.01)  # for the rest of this run


def test_a_folder_that_cannot_be_searched_ends_nothing(tmp_path, monkeypatch):
    def denied(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", denied)
    with pytest.warns(UserWarning, match="Permission denied"):
        assert contents(opened(tmp_path)) == NOTHING


def test_the_oldest_files_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy_store, "_TUNING", accuracy_store.StoreTuning(max_files=3))
    (tmp_path / "profile.json").write_text("{}")
    for number in range(5):
        store = opened(tmp_path, depends={"weights": str(number)})
        store.keep_estimate(TOPK, SCHEDULE, 24, Estimate(0.75))
        newest = max(tmp_path.glob("accuracy-*.json"), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (number, number))
    left = [json.loads(path.read_text())["dependencies"]["weights"] for path in tmp_path.glob("accuracy-*.json")]
    assert sorted(left) == ["2", "3", "4"]
    assert (tmp_path / "profile.json").exists()
