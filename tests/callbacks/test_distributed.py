"""Two processes: one decides, both do the same; and what `on_rank_zero` promises."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.fresh import run_ranks

pytestmark = pytest.mark.long

PROGRAM = Path(__file__).with_name("two_ranks.py")
EVEN = ["one odd", "a batch of one", "one image", "even", "shuffled", "dropped last", "a part", "several"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each of two processes found; they start once for all tests, which takes most of the time."""
    target = tmp_path_factory.mktemp("ddp") / "found.json"
    for run in run_ranks(PROGRAM, str(target), folder=target.parent):
        assert run.returncode == 0, run.stderr
    return {
        name: [json.loads(target.with_suffix(f"{ending}.{rank}").read_text()) for rank in range(2)]
        for name, ending in (("ranks", ""), ("counted", ".counted"))
    }


@pytest.fixture(scope="module")
def ranks(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What each rank found of deciding."""
    return found["ranks"]


@pytest.fixture(scope="module")
def counted(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What each rank found on data that two cannot share evenly, in fit and in predict."""
    return found["counted"]


@pytest.mark.long
def test_only_rank_zero_measures_and_both_ranks_use_its_schedule(ranks: list[dict[str, Any]]) -> None:
    for name, what in (("planned", "plan_many"), ("given", "time_given")):
        first, second = (rank[name] for rank in ranks)
        assert (first["rank"], second["rank"]) == (0, 1)
        assert (first["measured"], second["measured"]) == ([what], [])
        assert first["removed"] == second["removed"] is not None
        assert first["tokens"] == second["tokens"] == [17 - sum(first["removed"])]
        assert first["images"] == second["images"] == 16


def test_metrics_are_the_same_on_both_ranks(ranks: list[dict[str, Any]]) -> None:
    for name in ("planned", "given"):
        first, second = (rank[name]["metrics"] for rank in ranks)
        assert first == second
        assert first["pruning/removed"] == sum(ranks[0][name]["removed"])


def test_two_ranks_log_what_one_process_logs(ranks: list[dict[str, Any]]) -> None:
    alone, together = ranks[0]["alone"], ranks[1]["given"]
    assert alone["error"] is None
    assert alone["images"] == 32
    assert together["removed"] == alone["removed"] == [0, 6, 0, 0]
    for name in ("accuracy", "loss", "pruning/removed", "pruning/tokens"):
        assert together["metrics"][name] == pytest.approx(alone["metrics"][name], rel=1e-5)
    dense = ranks[0]["dense"]
    assert dense["tokens"] == [17]
    assert dense["metrics"]["loss"] != pytest.approx(alone["metrics"]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "refused",
            "ScheduleError",
            "`schedule` must remove at most 14 of the 17 tokens that enter block 1 with pomt, got 17",
        ),
        ("failed", "ValueError", "the abacus is broken"),
        ("unreadable", "ValueError", "no images on rank 0"),
    ],
)
def test_an_error_on_rank_zero_is_raised_on_both_ranks(
    ranks: list[dict[str, Any]], name: str, kind: str, message: str
) -> None:
    first, second = (rank[name] for rank in ranks)
    assert first["error"].startswith(f"{kind}: {message}")
    assert second["error"].startswith(f"PruneError: {kind} on rank 0: {message}")
    assert first["images"] == second["images"] == 0


def test_only_rank_zero_needs_to_find_images(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["tolerated"] for rank in ranks)
    assert (first["error"], second["error"]) == (None, None)
    assert first["removed"] == second["removed"] == [0, 6, 0, 0]
    assert first["tokens"] == second["tokens"] == [11]


def test_models_are_restored_on_both_ranks(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for found in rank.values():
            assert found["block"] == "Block"


@pytest.mark.parametrize("variant", ["dense", "pruned"])
@pytest.mark.parametrize("data", EVEN)
def test_no_image_is_counted_twice(counted: list[dict[str, Any]], data: str, variant: str) -> None:
    """Two processes say of any number of images what one says, though a sampler repeats some of them."""
    alone = counted[0]["one"][data][variant]
    stages = ("val", "test") if data == "one odd" else ("val",)
    for rank in counted:
        together = rank["two"][data][variant]
        for stage in stages:
            for name in ("top1", "top5"):
                assert together[f"{stage}/{name}"] == alone[f"{stage}/{name}"]
            assert together[f"{stage}/loss"] == pytest.approx(alone[f"{stage}/loss"], rel=1e-6)
            assert together[f"{stage}/throughput"] > 0
        assert together["warned"] == []
    if data != "one image":
        assert 0 < alone["val/top1"] < alone["val/top5"] < 1


@pytest.mark.parametrize("variant", ["dense", "pruned"])
def test_rank_zero_warns_of_images_that_may_be_counted_twice(counted: list[dict[str, Any]], variant: str) -> None:
    alone = counted[0]["one"]["own batches"][variant]
    for name, of in (("own batches", [rank["two"]["own batches"] for rank in counted]), ("own shards", None)):
        first, second = of or [rank[name] for rank in counted]
        sampler = {"own batches": "DistributedSampler", "own shards": "list"}[name]
        message = (
            f"{sampler} repeats 1 of 21 items so that 2 processes get the same number, and it is unknown in which "
            "batches: accuracy and loss count these items twice."
        )
        assert set(first[variant]["warned"]) == {message}
        assert second[variant]["warned"] == []
        assert first[variant]["val/top5"] == second[variant]["val/top5"] != alone["val/top5"]


def test_fit_trains_as_without_the_callback_and_prunes_validation(counted: list[dict[str, Any]]) -> None:
    for rank in counted:
        fitted, dense = rank["fitted"], rank["fitted dense"]
        assert fitted["tokens"] == {"train": [17], "val": [11], "sanity": [17]}
        assert dense["tokens"] == {"train": [17], "val": [17], "sanity": [17]}
        assert fitted["removed"] == [0, 6, 0, 0]
        assert not fitted["patched"]
        assert fitted["weights"] == dense["weights"] == counted[0]["fitted"]["weights"]


def test_values_of_each_image_are_those_of_one_process(counted: list[dict[str, Any]]) -> None:
    alone = counted[0]["step values alone"]
    assert [len(each) for each in alone] == [21, 1]
    for rank in counted:
        for own, expected in zip(rank["step values"], alone, strict=True):
            shared = [*expected[::2], *expected[1::2]]  # what rank 0 has, then what rank 1 has, without repeated images
            assert own == pytest.approx(shared, rel=1e-5)


def test_predictions_of_both_ranks_are_those_of_one_process(counted: list[dict[str, Any]]) -> None:
    alone = counted[0]["predicted alone"]
    assert len(alone) == 21
    for rank, found in enumerate(counted):
        expected = alone[rank::2]
        assert len(found["predicted"]) == len(expected) == 11 - rank
        for one, other in zip(found["predicted"], expected, strict=True):
            assert one == pytest.approx(other, abs=1e-5)


def test_a_rank_without_a_batch_takes_part_in_the_decision(counted: list[dict[str, Any]]) -> None:
    first, second = (rank["empty"]["(0,)"] for rank in counted)
    assert (first["error"], second["error"]) == (None, None)
    assert (first["measured"], second["measured"]) == (["time_given"], [])
    assert first["removed"] == second["removed"] == [0, 6, 0, 0]
    assert (first["images"], second["images"]) == (8, 0)
    assert second["metrics"]["pruning/removed"] == 6
    assert second["metrics"].items() <= first["metrics"].items()
    assert first["errors"] == second["errors"] == [None, None, None]
    assert first["rows"] == second["rows"]
    assert {images for _, _, images in first["rows"]} == {8}


def test_rank_zero_without_a_batch_is_an_error_on_all_ranks(counted: list[dict[str, Any]]) -> None:
    for rank in counted:
        found = rank["empty"]["(1,)"]
        for error in (found["error"], *found["errors"]):
            assert error.startswith("DataError: ")
            assert "rank 0" in error
        assert found["block"] == "Block"


def test_no_batch_on_any_rank_is_no_error_of_pruning(counted: list[dict[str, Any]]) -> None:
    for rank in counted:
        found = rank["empty"]["()"]
        assert (found["error"], found["removed"]) == (None, None)
        assert found["errors"][:2] == [None, None]
        assert found["errors"][2].startswith("DataError: ")


def test_a_step_that_changes_images_is_measured_again_after_the_first_batch(counted: list[dict[str, Any]]) -> None:
    """On rank 0 alone, and all ranks take the new schedule at the same batch."""
    first, second = (rank["halved"]["first"] for rank in counted)
    assert (first["error"], second["error"]) == (None, None)
    assert (first["measured"], second["measured"]) == (["time_given", "time_given"], [])
    assert first["dense_tokens"] == second["dense_tokens"] == 17
    assert first["removed"] == second["removed"] == [0, 8, 0, 0]
    assert first["steps"] == second["steps"] == [9, 9]
    (text,) = first["warned"]
    assert "images (4, 3, 32, 32) instead of (4, 3, 64, 64)" in text
    assert "after this batch" in text
    assert second["warned"] == []


def test_the_next_run_of_two_ranks_keeps_that_schedule(counted: list[dict[str, Any]]) -> None:
    for rank in counted:
        found = rank["halved"]["second"]
        assert (found["error"], found["warned"], found["dense_tokens"]) == (None, [], 17)
        assert found["measured"] == []
        assert found["steps"] == [9] * 4  # of both runs


def test_two_ranks_plan_again_and_agree(counted: list[dict[str, Any]]) -> None:
    first, second = (rank["halved"]["planned"] for rank in counted)
    assert (first["error"], second["error"]) == (None, None)
    assert (first["measured"], second["measured"]) == (["plan_many", "plan_many"], [])
    assert first["removed"] == second["removed"]
    assert first["dense_tokens"] == second["dense_tokens"] == 17
    assert first["steps"] == second["steps"]
    assert first["steps"][1] == 17 - sum(first["removed"])


def test_what_forward_changes_is_measured_once_before_the_first_batch(counted: list[dict[str, Any]]) -> None:
    first, second = (rank["halved"]["in forward"] for rank in counted)
    assert (first["error"], second["error"]) == (None, None)
    assert (first["measured"], second["measured"]) == (["time_given"], [])
    assert first["dense_tokens"] == second["dense_tokens"] == 17
    assert first["steps"] == second["steps"] == [9, 9]
    assert first["warned"] == second["warned"] == []


@pytest.mark.parametrize("name", ["one rank skips", "uneven"])
def test_ranks_agree_though_one_does_not_call_the_transformer_or_has_fewer_batches(
    counted: list[dict[str, Any]], name: str
) -> None:
    first, second = (rank["halved"][name] for rank in counted)
    assert (first["error"], second["error"]) == (None, None)
    assert first["measured"] == ["time_given", "time_given"]
    assert first["dense_tokens"] == second["dense_tokens"] == 17
    assert (first["steps"], second["steps"]) == ([9, 9], [9])
    assert first["metrics"] == second["metrics"]
