"""What is kept between runs: read back as it was, whole or not at all, and never for another question."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_prune as lp
from lightning_prune._utils.digests import weights_digest
from lightning_prune._utils.files import slug
from lightning_prune._utils.measurement_source import MeasurementSource
from lightning_prune.comparison.fingerprints import data_identity, differences, fingerprint_digest, fingerprint_of
from lightning_prune.comparison.planned_variants import ComparisonPlan, PlannedVariant, UnreachedTarget
from lightning_prune.comparison.predictions import Predictions
from lightning_prune.comparison.request_reading import read_methods
from lightning_prune.comparison.requests import VariantRequest
from lightning_prune.comparison.resume import ResumeState, VariantResult
from lightning_prune.profiling import LatencyProfile, LatencyStats
from lightning_prune.reduction import POMT, RandomDrop

FINGERPRINT = {"weights": "abc", "speedups": [1.5], "methods": {"pomt": {}}}
TIMING = LatencyStats(10.0, 0.5, 0.8, 0.01, 51)
PLAN = ComparisonPlan(
    planned=[
        PlannedVariant("dense", "dense", timing=TIMING),
        PlannedVariant(
            variant="pomt 1.5x",
            request="pomt",
            method="pomt",
            target_speedup=1.5,
            settings={"dropped": "mean"},
            schedule=lp.Schedule.single(4, 1, 5, "tome", MeasurementSource(device="Abacus")),
            timing=TIMING,
        ),
        PlannedVariant(
            variant="topk utility",
            request="topk utility",
            keep_rates=lp.KeepRates([1, 0.5, 1, 1]),
            plan={"reason": "Best.", "met": True},
        ),
        PlannedVariant("int8", "int8", "int8", True, note="no int8 on abacus"),
    ],
    unreached=[UnreachedTarget("pomt", 6.0, 1.6, "timed up to 194")],
    context={"device": "Abacus", "batch_size": 8, "image_shape": [1, 56, 56]},
    dense_tokens=197,
    energy="n/a",
    seconds=1.25,
    started="2026-01-02T03:04:05+00:00",
    profile=LatencyProfile(
        tokens=(1, 197),
        milliseconds=(1.0, 2.0),
        spread=(0.1, 0.1),
        rounds=(3, 3),
        method="random",
        block=0,
        depth=4,
        context={"device": "Abacus"},
    ),
    calibration="8 images",
)
RESULT = VariantResult({"val/top1": 0.875}, 4, Predictions([1, 2, 3, 4], [1, 2, 0, -1]))


def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    state = ResumeState(tmp_path, FINGERPRINT)
    assert (state.is_known, state.plan(), state.result("pomt 1.5x")) == (False, None, None)
    state.keep_plan(PLAN)
    state.keep_result("pomt 1.5x", RESULT)
    state.keep_result("dense", VariantResult({}, 0, None))
    again = ResumeState(tmp_path, FINGERPRINT)
    assert again.is_known
    found = again.plan()
    assert found == PLAN
    assert found.planned[1].schedule.made_on == MeasurementSource(device="Abacus")
    assert again.result("pomt 1.5x") == RESULT
    assert again.result("dense") == VariantResult({}, 0, None)
    assert again.result("int8") is None


def test_fresh_forgets_this_question_only(tmp_path: Path) -> None:
    other = ResumeState(tmp_path, {**FINGERPRINT, "speedups": [2.0]})
    other.keep_plan(PLAN)
    ResumeState(tmp_path, FINGERPRINT).keep_plan(PLAN)
    assert ResumeState(tmp_path, FINGERPRINT, resume=False).plan() is None
    assert ResumeState(tmp_path, {**FINGERPRINT, "speedups": [2.0]}).plan() == PLAN


def test_says_what_is_new_in_a_question(tmp_path: Path) -> None:
    assert ResumeState(tmp_path, FINGERPRINT).changed_settings() == []
    ResumeState(tmp_path, {**FINGERPRINT, "weights": "def", "speedups": [3.0]})
    assert ResumeState(tmp_path, {**FINGERPRINT, "weights": "xyz"}).changed_settings() == ["weights"]
    assert ResumeState(tmp_path, FINGERPRINT).changed_settings() == []


@pytest.mark.parametrize("name", ["plan.json", "variants/dense.json", "variants/dense.npy"])
@pytest.mark.parametrize("damage", ["cut", "gone", "foreign"])
def test_a_damaged_file_counts_as_not_there(name: str, damage: str, tmp_path: Path) -> None:
    state = ResumeState(tmp_path, FINGERPRINT)
    state.keep_plan(PLAN)
    state.keep_result("dense", RESULT)
    path = state.folder / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:40] if damage == "cut" else b'{"format": "lightning_prune.schedule"}')
    again = ResumeState(tmp_path, FINGERPRINT)
    assert again.plan() == (None if name == "plan.json" else PLAN)
    assert again.result("dense") == (RESULT if name == "plan.json" else None)


@pytest.mark.parametrize("damage", ["nothing", "another shape", "another number", "letters", "archive", "too large"])
def test_damaged_outcomes_count_as_not_there(damage: str, tmp_path: Path) -> None:
    state = ResumeState(tmp_path, FINGERPRINT)
    state.keep_result("dense", RESULT)
    path = state.folder / "variants" / "dense.npy"
    whole = path.read_bytes()
    if damage == "nothing":
        path.write_bytes(b"")
    elif damage == "too large":
        path.write_bytes(whole.replace(b"(2, 4), }         ", b"(2, 999999999), }"))
    elif damage == "archive":
        with path.open("wb") as stream:
            np.savez(stream, np.zeros(2))
    else:
        shapes = {"another shape": np.zeros(2), "another number": np.zeros((2, 3)), "letters": np.full((2, 4), "a")}
        np.save(path, shapes[damage] if damage == "letters" else shapes[damage].astype(np.int32))
    assert path.read_bytes() != whole
    assert ResumeState(tmp_path, FINGERPRINT).result("dense") is None


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("mine")
    with pytest.raises(lp.ArgumentError, match="`output` must have a folder `state` that can be written to"):
        ResumeState(tmp_path, FINGERPRINT)


def test_no_half_file_is_left_by_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = ResumeState(tmp_path, FINGERPRINT)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_prune.comparison.resume.np.save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        state.keep_result("dense", RESULT)
    assert list((state.folder / "variants").iterdir()) == []
    assert ResumeState(tmp_path, FINGERPRINT).result("dense") is None


@pytest.mark.parametrize(
    ("variant", "name"),
    [("pomt 1.25x", "pomt-1.25x"), ("pomt+int8 2x", "pomt+int8-2x"), ("../../x y", "..-..-x-y"), ("dense", "dense")],
)
def test_names_of_files(variant: str, name: str) -> None:
    assert slug(variant) == name


def test_long_names_are_cut_and_differ() -> None:
    one, other = slug("x" * 400 + " 1.5x"), slug("x" * 400 + " 2x")
    assert one != other
    assert max(len(one), len(other)) < 200


def test_weights_are_told_apart_to_the_bit() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(torch.bfloat16)

    one, other = model(), model()
    assert weights_digest(one) == weights_digest(other)
    with torch.no_grad():
        other[0].weight[0, 0] = torch.nextafter(other[0].weight[0, 0].float(), torch.tensor(9.0)).bfloat16() + 0.01
    assert weights_digest(one) != weights_digest(other)
    assert weights_digest(one) != weights_digest(model().float())
    renamed = nn.Sequential(nn.Linear(3, 4))
    assert weights_digest(nn.ModuleDict({"a": renamed})) != weights_digest(nn.ModuleDict({"b": renamed}))


def test_data_is_told_apart_by_size_limit_and_first_batch() -> None:
    images = torch.arange(24.0).reshape(6, 1, 2, 2)
    loader = DataLoader(TensorDataset(images, torch.arange(6)), batch_size=2)
    batch = [images[:2], torch.arange(2)]
    known = data_identity(loader, batch, 1.0)
    assert known == data_identity([loader], batch, 1.0)
    assert known["items"] == [6]
    assert differences(known, data_identity(loader, batch, 2)) == ["limit_val_batches"]
    assert differences(known, data_identity(loader, [images[:2], torch.arange(1, 3)], 1.0)) == ["first_batch"]
    fewer = DataLoader(TensorDataset(images[:4], torch.arange(4)), batch_size=2)
    assert differences(known, data_identity(fewer, batch, 1.0)) == ["items"]


class Stream(IterableDataset[Any]):
    """Does not know its length, though its class says so."""

    def __iter__(self) -> Any:
        yield from torch.zeros(3, 1, 2, 2)

    def __len__(self) -> int:
        raise TypeError("a stream has no length")


def test_data_of_unknown_length() -> None:
    assert data_identity(DataLoader(Stream()), torch.zeros(1, 1, 2, 2), 2)["items"] == [None]


def test_tensors_that_a_method_holds_are_told_apart_everywhere() -> None:
    def fingerprint(held: torch.Tensor) -> dict[str, Any]:
        method = RandomDrop()
        vars(method)["held"] = held
        return fingerprint_of(
            weights="",
            data={},
            conditions={},
            requests=[VariantRequest("random", method, False)],
            speedups=[],
            settings={},
        )

    weights = torch.zeros(5000)
    changed = weights.clone()
    changed[2500] = 1
    assert fingerprint(weights) == fingerprint(weights.clone())
    assert differences(fingerprint(weights), fingerprint(changed)) == ["methods"]


def test_objectives_and_given_schedules_are_told_apart() -> None:
    def fingerprint(**more: Any) -> dict[str, Any]:
        requests = [VariantRequest("pomt", POMT(), False, **more)]
        return fingerprint_of(weights="", data={}, conditions={}, requests=requests, speedups=[], settings={})

    objectives = [lp.AccuracyBudget(0.1), lp.AccuracyBudget(0.2), lp.Utility(0.1), lp.LatencyBudget(speedup=1.1)]
    schedules = [60, 0.5, [0, 60, 0, 0], lp.Schedule([0, 60, 0, 0]), lp.Schedule([0, 0, 60, 0]), lp.KeepRates([1, 0.5])]
    kinds = [fingerprint(), *(fingerprint(objective=each) for each in objectives)]
    kinds += [fingerprint(schedule=each) for each in schedules]
    assert len({fingerprint_digest(kind) for kind in kinds}) == len(kinds)
    assert fingerprint(objective=lp.AccuracyBudget(0.1)) == kinds[1]
    assert fingerprint(schedule=lp.Schedule([0, 60, 0, 0])) == kinds[8]


def test_another_release_is_not_resumed_but_named(tmp_path: Path) -> None:
    other = ResumeState(tmp_path, {**FINGERPRINT, "speedups": [2.0]})
    path = other.folder / "fingerprint.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 1'))
    (tmp_path / "state" / "earlier").mkdir()
    (tmp_path / "state" / "earlier" / "question.json").write_text("{}")
    state = ResumeState(tmp_path, FINGERPRINT)
    assert state.unreadable() == sorted([other.folder, tmp_path / "state" / "earlier"])
    assert (state.changed_settings(), state.plan(), state.result("dense")) == ([], None, None)


def test_a_fingerprint_is_what_the_results_depend_on() -> None:
    shared: dict[str, Any] = {"weights": "a", "data": {"items": [3]}, "conditions": {"device": "Abacus"}}
    first = fingerprint_of(**shared, requests=read_methods(["pomt"], POMT()), speedups=[1.5], settings={"block": 0.25})
    again = fingerprint_of(**shared, requests=read_methods(["pomt"], POMT()), speedups=[1.5], settings={"block": 0.25})
    assert fingerprint_digest(first) == fingerprint_digest(again)
    seeded = read_methods(["random"], RandomDrop(seed=1))
    plain = fingerprint_of(**shared, requests=read_methods(["random"], POMT()), speedups=[1.5], settings={})
    assert differences(plain, fingerprint_of(**shared, requests=seeded, speedups=[1.5], settings={})) == ["methods"]
    for entries, speedups, block, key in [
        (["pomt", "random"], [1.5], 0.25, "methods"),
        (["pomt"], [2.0], 0.25, "speedups"),
        (["pomt"], [1.5], 3, "block"),
    ]:
        other = fingerprint_of(
            **shared, requests=read_methods(entries, POMT()), speedups=speedups, settings={"block": block}
        )
        assert differences(first, other) == [key]
        assert fingerprint_digest(first) != fingerprint_digest(other)
