"""Two processes: one decides, both do the same; and what `decided_by_rank_zero` promises."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("two_ranks.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found; they start once for all tests, which takes most of the time."""
    target = tmp_path_factory.mktemp("ddp") / "found.json"
    paths = os.pathsep.join(filter(None, [str(PROGRAM.parents[2]), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, str(PROGRAM), str(target)],
        cwd=target.parent,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(target.with_suffix(f".{rank}").read_text()) for rank in range(2)]


def test_rank_zero_alone_measures_and_both_do_the_same(ranks: list[dict[str, Any]]) -> None:
    for name, what in (("planned", "plan"), ("given", "measure_given")):
        first, second = (rank[name] for rank in ranks)
        assert (first["rank"], second["rank"]) == (0, 1)
        assert (first["measured"], second["measured"]) == ([what], [])
        assert first["removed"] == second["removed"] is not None
        assert first["tokens"] == second["tokens"] == [17 - sum(first["removed"])]
        assert first["images"] == second["images"] == 16


def test_figures_are_the_same_on_both_ranks(ranks: list[dict[str, Any]]) -> None:
    for name in ("planned", "given"):
        first, second = (rank[name]["metrics"] for rank in ranks)
        assert first == second
        assert first["pruning/removed"] == sum(ranks[0][name]["removed"])


def test_two_ranks_find_what_one_process_finds(ranks: list[dict[str, Any]]) -> None:
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
            "Block 1 is asked to remove 17 tokens, but of the 17 that enter it pomt can remove",
        ),
        ("failed", "ValueError", "the abacus is broken"),
        ("unreadable", "ValueError", "no images on rank 0"),
    ],
)
def test_an_error_of_rank_zero_is_raised_on_both(
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
