"""A small model of every kind in timm, by class, block, attention, positions and pooling."""

import copy
import csv
import pickle
from typing import Any

import pytest
import timm
import torch

import lightning_prune as lp
from lightning_prune.patching import find_vision_transformer
from lightning_prune.patching.class_swap import is_patched_module
from lightning_prune.patching.models.support import WITH_RESTORE, isotropic_names

from .sweep import ROOT, coverage

NAMES = set(timm.list_models())  # sorted at each call
with (ROOT / "examples" / "results" / "coverage_timm.csv").open(encoding="utf-8") as file:
    ROWS = [row for row in csv.DictReader(file) if row["name"] in NAMES]

pytestmark = pytest.mark.long

KIND = ("model", "block", "attention", "positions", "pooling")
REPRESENTATIVES: dict[str, dict[str, str]] = {}
for _row in ROWS:
    if _row["reducible"] != "no":
        REPRESENTATIVES.setdefault(" ".join(_row[column] for column in KIND), _row)
EXPORTED = {row["name"] for row in {row["model"]: row for row in REPRESENTATIVES.values()}.values()}
# Pooling adds nothing to what is traced but the sizes of tokens, which others have, too.
TRACED = {(row["block"], row["attention"], row["positions"]): row for row in REPRESENTATIVES.values()}
TRACED |= {(name,): row for row in REPRESENTATIVES.values() if (name := row["name"]) in EXPORTED}


@pytest.fixture(params=REPRESENTATIVES.values(), ids=[row["name"] for row in REPRESENTATIVES.values()])
def row(request: pytest.FixtureRequest) -> dict[str, str]:
    found: dict[str, str] = request.param
    return found


def small(row: dict[str, str], **more: int) -> tuple[Any, torch.Tensor]:
    """A model and images for it."""
    more |= {"local_up_to_layer": 2} if "ConV" in row["model"] else {}
    model = coverage.stir(coverage.build_small(row["name"], **more))
    return model, torch.randn(2, 3, *coverage.image_size(model), generator=torch.Generator().manual_seed(0))


def patched(model: Any, row: dict[str, str], method: str) -> lp.PatchHandle:
    """Patched in two blocks; removed tokens are given back where the model needs them."""
    restore: Any = "auto" if row["reducible"] == WITH_RESTORE else None
    schedule = coverage.schedules(find_vision_transformer(model, restore=restore))[1]
    return lp.patch(model, method, schedule, restore=restore)


def test_the_results_cover_all_names_without_failure() -> None:
    assert {row["name"] for row in ROWS} == set(isotropic_names())
    assert len(REPRESENTATIVES) >= 31
    for row in ROWS:
        if row["reducible"] != "no":
            assert row["parity"] == row["removal"] == row["pomt"] == "True", row
            assert float(row["oracle"]) < (1e-6 if row["model"].startswith("Deepseek") else 1e-10), row


def test_parity_removal_and_oracle(row: dict[str, str]) -> None:
    found = coverage.row(row["name"])
    assert coverage.passed(found)
    assert found["reducible"] == row["reducible"]
    for column in KIND:
        assert str(found[column]) == row[column]


@torch.no_grad()
def test_in_single_precision(row: dict[str, str]) -> None:
    model, images = small(row)
    reference = copy.deepcopy(model).double()
    with patched(reference, row, "random"), patched(model, row, "random"):
        assert coverage.relative_error(model(images).double(), reference(images.double())) < 1e-5


@torch.no_grad()
def test_copies_and_pickles_are_patched_and_can_be_unpatched(row: dict[str, str]) -> None:
    model, images = small(row)
    dense = model(images)
    with patched(model, row, "pomt"):
        pruned = model(images)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(images), pruned)
            lp.patching.unpatch(other)
            assert torch.equal(other(images), dense)
            assert not any(is_patched_module(module) for module in other.modules())
    assert not torch.equal(pruned, dense)


@torch.no_grad()
def test_half_precision_and_autocast(row: dict[str, str]) -> None:
    """Bit-identical after removal; near the float32 result while patched."""
    model, images = small(row)
    half = copy.deepcopy(model).bfloat16()
    before = half(images.bfloat16())
    with patched(half, row, "random"), patched(model, row, "random"):
        expected = model(images)
        found = half(images.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(images)
    assert found.dtype == torch.bfloat16
    for each in (found, mixed):
        assert torch.nn.functional.cosine_similarity(each.float(), expected, dim=-1).min() > 0.98
    assert torch.equal(half(images.bfloat16()), before)
    with patched(half, row, "pomt"):
        assert half(images.bfloat16()).isfinite().all()


@pytest.mark.parametrize("row", {row["name"]: row for row in TRACED.values()}.values(), ids=lambda row: row["name"])
def test_one_graph(row: dict[str, str]) -> None:
    """Also for export of one model of each class, which traces the same code."""
    model, images = small(row, depth=3)  # one block that reduces nothing and two that do
    torch._dynamo.reset()
    with patched(model, row, "pomt"), torch.no_grad():
        expected = model(images)
        fast = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(fast(images), expected, rtol=1e-5, atol=1e-5)
        if row["name"] in EXPORTED:
            exported = torch.export.export(model, (images,)).module()
            torch.testing.assert_close(exported(images), expected, rtol=1e-5, atol=1e-5)
