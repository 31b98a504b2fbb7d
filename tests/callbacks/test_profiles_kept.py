"""The profile of one run in the next: found, said, refreshed, and not kept where that is asked for."""

from pathlib import Path
from typing import Any

import pytest

import lightning_prune as lp
from helpers.data import loader
from lightning_prune.profiling import cache as reuse

from .tiny import Tiny, pruner, trainer

pytestmark = pytest.mark.usefixtures("clockwork")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every profile that is measured."""
    made: list[str] = []
    real = reuse.profile_latency

    def counted(*args: Any, **kwargs: Any) -> lp.LatencyProfile:
        made.append("profile")
        return real(*args, **kwargs)

    monkeypatch.setattr(reuse, "profile_latency", counted)
    return made


def run(**kwargs: Any) -> lp.TokenPruning:
    callback = pruner(**kwargs)
    trainer(callback).validate(Tiny(), loader(8), verbose=False)
    return callback


def test_a_later_run_finds_the_profile_and_says_so(measured: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    first, second = run(), run(verbose=True)
    assert measured == ["profile"]
    assert first.decision.reused == ""
    assert second.decision.reused == first.decision.plan.profile.context["measured"]
    assert second.decision.plan.profile == first.decision.plan.profile
    said = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert f"of {second.decision.reused}, kept; `refresh` measures it anew" in said


def test_refresh_measures_anew(measured: list[str]) -> None:
    run()
    assert run(refresh=True).decision.reused == ""
    assert measured == ["profile"] * 2


def test_refresh_between_runs_decides_anew_once(measured: list[str]) -> None:
    callback, module = pruner(), Tiny()
    validate = lambda: trainer(callback).validate(module, loader(8), verbose=False)  # noqa: E731
    validate()
    first = callback.decision
    callback.refresh = True
    validate()
    second = callback.decision
    assert second is not first
    validate()
    assert callback.decision is second  # it stands, also for the epochs of a fit
    callback.refresh = True  # as it was
    validate()
    assert measured == ["profile"] * 2


def test_none_keeps_nothing_and_a_folder_keeps_it_there(measured: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        run(cache_dir=None)
    assert measured == ["profile"] * 2
    for _ in range(2):
        run(cache_dir=tmp_path / "mine")
    assert measured == ["profile"] * 3
    assert len(list((tmp_path / "mine").iterdir())) == 1


def test_another_batch_size_or_block_is_measured(measured: list[str]) -> None:
    run()
    run(block=2)
    callback = pruner()
    trainer(callback).validate(Tiny(), loader(8, batch_size=2), verbose=False)
    assert measured == ["profile"] * 3


@pytest.mark.parametrize("value", [3, False])
def test_what_is_no_folder_is_refused(value: Any) -> None:
    with pytest.raises(lp.ArgumentError, match=f"`cache_dir` must be a folder, 'auto' or None, got {value}"):
        pruner(cache_dir=value)
