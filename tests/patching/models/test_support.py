"""The command `models`, compared with docs/models.md and the stored results."""

import csv
from pathlib import Path

import pytest
import timm

from lightning_prune.__main__ import main
from lightning_prune.cli.models_command import markdown, summary
from lightning_prune.patching.models.support import SupportStatus, grouped, isotropic_names, support_of

ROOT = Path(__file__).parent.parent.parent.parent


@pytest.fixture(scope="module")
def statuses() -> list[SupportStatus]:
    return [support_of(name) for name in isotropic_names()]


@pytest.mark.long
def test_the_documentation_has_the_table(statuses: list[SupportStatus]) -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert f"is for timm {timm.__version__}:" in page, "renew the table: lightning-prune models --markdown"
    assert markdown(grouped(statuses)) in page


def test_stored_results_match_the_current_support(statuses: list[SupportStatus]) -> None:
    with (ROOT / "examples" / "results" / "coverage_timm.csv").open(encoding="utf-8") as file:
        checked = {row["name"]: row["reducible"] for row in csv.DictReader(file)}
    assert checked == {each.name: each.reducible for each in statuses}


def test_the_counts(statuses: list[SupportStatus]) -> None:
    assert len(statuses) == 381
    found = summary(statuses)
    assert f"timm {timm.__version__} has 381 names" in found
    assert "301 can be pruned, 34 in part or with `restore`, 46 not" in found
    assert sum(group.names for group in grouped(statuses)) == 381


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_tiny_patch16_224", ("VisionTransformer", "yes", "")),
        ("vit_7b_patch16_dinov3", ("Eva", "yes", "")),
        ("convit_tiny", ("ConVit", "from block 10", "by position on the whole grid")),
        ("cait_xxs24_224", ("Cait", "pruning only", "weighted by the sizes of merged tokens")),
        (
            "vit_base_patch16_xp_224",
            ("VisionTransformer", "after the block", "a ParallelScalingBlock cannot be split"),
        ),
        ("xcit_nano_12_p16_224", ("Xcit", "no", "grid of tokens")),
    ],
)
def test_some_names(name: str, expected: tuple[str, str, str]) -> None:
    found = support_of(name)
    assert found[:3] == (name, *expected[:2])
    assert expected[2] in found.reason


def test_matching_names_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "convit_*", "tnt_s*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("convit", "tnt"))] == [
        "convit_base",
        "convit_small",
        "convit_tiny",
        *timm.list_models("tnt_s*"),
    ]


def test_no_matching_name_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "resnet*"]) == 2
    printed = capsys.readouterr().out
    assert "resnet*" in printed
    assert "cannot be pruned" in printed


def test_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--markdown", "beit*"]) == 0
    rows = capsys.readouterr().out.strip().splitlines()
    assert rows[0] == "| model | names | can be pruned | why not, or not everywhere |"
    assert rows[2] == "| `Beit` | 7 | yes | |"
