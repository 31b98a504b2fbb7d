"""`models`: names in one piece, and why models cannot be pruned."""

import pytest

from lightning_prune.cli.models_command import models
from lightning_prune.patching.models.support import isotropic_names, unsupported_names
from lightning_prune.patching.models.unsupported import _STAGES


@pytest.mark.parametrize("width", [80, 200])
def test_names_are_in_one_piece(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert models(["vit_tiny_patch16*"]) == 0
    head, *rows = (line.split() for line in capsys.readouterr().out.splitlines() if not line.startswith(" "))
    assert head[:2] == ["name", "model"]
    assert ["vit_tiny_patch16_dinov3_qkvb", "Eva", "yes"] in rows
    assert {row[0] for row in rows} == {name for name in isotropic_names() if name.startswith("vit_tiny_patch16")}


def test_the_class_gives_way_to_the_reason(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for width, has_class in ((80, False), (140, True)):
        monkeypatch.setenv("COLUMNS", str(width))
        assert models(["swinv2_base_window12*"]) == 0
        out = capsys.readouterr().out
        assert ("SwinTransformerV2" in out) == has_class
        assert max(map(len, out.splitlines())) <= width


@pytest.mark.parametrize("pattern", ["swin_tiny*", "hiera_tiny*", "tiny_vit_5m*"])  # with their class named and without
def test_models_that_cannot_be_pruned_are_listed_with_the_reason(
    pattern: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert models([pattern]) == 0
    _, row = capsys.readouterr().out.splitlines()
    assert row.startswith(pattern[:-1])
    assert row.split()[2] == "no"
    assert row.strip().endswith(_STAGES)


def test_a_reason_is_written_out_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert models(["swin_*"]) == 0
    out = capsys.readouterr().out
    assert (out.count(_STAGES), out.count("swin_")) == (1, out.count("as above") + 1)


@pytest.mark.parametrize(("pattern", "others"), [("zzz*", ""), ("resnet50", "1 models")])
def test_a_pattern_without_a_transformer_ends_with_2(
    pattern: str, others: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert models([pattern]) == 2
    out = capsys.readouterr().out
    assert pattern in out
    assert others in out


def test_no_name_is_of_both_kinds() -> None:
    assert not set(isotropic_names()) & set(unsupported_names())
