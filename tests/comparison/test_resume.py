"""What is kept between runs: read back as it was, whole or not at all, and never for another question."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_prune as lp
from lightning_prune._utils.files import slug
from lightning_prune.comparison.predictions import Outcomes
from lightning_prune.comparison.resume import (
    State,
    VariantResult,
    ask,
    data_identity,
    differences,
    question_digest,
    weights_digest,
)
from lightning_prune.comparison.variants import (
    ComparisonPlan,
    PlannedVariant,
    UnreachedTarget,
    VariantRequest,
    read_methods,
)
from lightning_prune.profiling import LatencyStats
from lightning_prune.reduction import POMT, RandomDrop
from lightning_prune.schedule import MeasurementSource

QUESTION = {"weights": "abc", "speedups": [1.5], "methods": {"pomt": {}}}
TIMING = LatencyStats(10.0, 0.5, 0.8, 0.01, 51)
DECIDED = ComparisonPlan(
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
        PlannedVariant("int8", "int8", "int8", True, note="no int8 on abacus"),
    ],
    unreached=[UnreachedTarget("pomt", 6.0, 1.6, "timed up to 194")],
    context={"device": "Abacus", "batch_size": 8, "image_shape": [1, 56, 56]},
    dense_tokens=197,
    energy="n/a",
    seconds=1.25,
    started="2026-01-02T03:04:05+00:00",
)
FINISHED = VariantResult({"val/top1": 0.875}, 4, Outcomes([1, 2, 3, 4], [1, 2, 0, -1]))


def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    state = State(tmp_path, QUESTION)
    assert (state.known, state.decided(), state.finished("pomt 1.5x")) == (False, None, None)
    state.keep_decided(DECIDED)
    state.keep_finished("pomt 1.5x", FINISHED)
    state.keep_finished("dense", VariantResult({}, 0, None))
    again = State(tmp_path, QUESTION)
    assert again.known
    found = again.decided()
    assert found == DECIDED
    assert found.planned[1].schedule.made_on == MeasurementSource(device="Abacus")
    assert again.finished("pomt 1.5x") == FINISHED
    assert again.finished("dense") == VariantResult({}, 0, None)
    assert again.finished("int8") is None


def test_fresh_forgets_this_question_only(tmp_path: Path) -> None:
    other = State(tmp_path, {**QUESTION, "speedups": [2.0]})
    other.keep_decided(DECIDED)
    State(tmp_path, QUESTION).keep_decided(DECIDED)
    assert State(tmp_path, QUESTION, fresh=True).decided() is None
    assert State(tmp_path, {**QUESTION, "speedups": [2.0]}).decided() == DECIDED


def test_says_what_is_new_in_a_question(tmp_path: Path) -> None:
    assert State(tmp_path, QUESTION).news() == []
    State(tmp_path, {**QUESTION, "weights": "def", "speedups": [3.0]})
    assert State(tmp_path, {**QUESTION, "weights": "xyz"}).news() == ["weights"]
    assert State(tmp_path, QUESTION).news() == []


@pytest.mark.parametrize("name", ["decided.json", "rows/dense.json", "rows/dense.npy"])
@pytest.mark.parametrize("damage", ["cut", "gone", "foreign"])
def test_a_damaged_file_counts_as_not_there(name: str, damage: str, tmp_path: Path) -> None:
    state = State(tmp_path, QUESTION)
    state.keep_decided(DECIDED)
    state.keep_finished("dense", FINISHED)
    path = state.folder / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:40] if damage == "cut" else b'{"format": "lightning_prune.schedule"}')
    again = State(tmp_path, QUESTION)
    assert again.decided() == (None if name == "decided.json" else DECIDED)
    assert again.finished("dense") == (FINISHED if name == "decided.json" else None)


@pytest.mark.parametrize("damage", ["nothing", "another shape", "another number", "letters", "archive", "too large"])
def test_damaged_outcomes_count_as_not_there(damage: str, tmp_path: Path) -> None:
    state = State(tmp_path, QUESTION)
    state.keep_finished("dense", FINISHED)
    path = state.folder / "rows" / "dense.npy"
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
    assert State(tmp_path, QUESTION).finished("dense") is None


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("mine")
    with pytest.raises(lp.ArgumentError, match="`output` must have a folder `state` that can be written to"):
        State(tmp_path, QUESTION)


def test_no_half_file_is_left_by_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = State(tmp_path, QUESTION)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_prune.comparison.resume.np.save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        state.keep_finished("dense", FINISHED)
    assert list((state.folder / "rows").iterdir()) == []
    assert State(tmp_path, QUESTION).finished("dense") is None


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
    def asked(held: torch.Tensor) -> dict[str, Any]:
        method = RandomDrop()
        vars(method)["held"] = held
        return ask(
            weights="", data={}, context={}, entries=[VariantRequest("random", method, False)], speedups=[], settings={}
        )

    weights = torch.zeros(5000)
    changed = weights.clone()
    changed[2500] = 1
    assert asked(weights) == asked(weights.clone())
    assert differences(asked(weights), asked(changed)) == ["methods"]


def test_a_question_is_what_it_depends_on() -> None:
    shared: dict[str, Any] = {"weights": "a", "data": {"items": [3]}, "context": {"device": "Abacus"}}
    first = ask(**shared, entries=read_methods(["pomt"], POMT()), speedups=[1.5], settings={"block": 0.25})
    again = ask(**shared, entries=read_methods(["pomt"], POMT()), speedups=[1.5], settings={"block": 0.25})
    assert question_digest(first) == question_digest(again)
    seeded = read_methods(["random"], RandomDrop(seed=1))
    plain = ask(**shared, entries=read_methods(["random"], POMT()), speedups=[1.5], settings={})
    assert differences(plain, ask(**shared, entries=seeded, speedups=[1.5], settings={})) == ["methods"]
    for entries, speedups, block, key in [
        (["pomt", "random"], [1.5], 0.25, "methods"),
        (["pomt"], [2.0], 0.25, "speedups"),
        (["pomt"], [1.5], 3, "block"),
    ]:
        other = ask(**shared, entries=read_methods(entries, POMT()), speedups=speedups, settings={"block": block})
        assert differences(first, other) == [key]
        assert question_digest(first) != question_digest(other)
