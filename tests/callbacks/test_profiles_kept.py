"""The profile of one run in the next: found, said, refreshed, and not kept where that is asked for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lightning_prune as lp
from helpers.data import loader
from lightning_prune.profiling import profile_reuse as reuse

from .tiny import Tiny, pruner, stop_counting, trainer

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


def unhooked() -> Tiny:
    """Whose tokens are not counted."""
    module = Tiny()
    stop_counting(module.vit)
    return module


def run(**kwargs: Any) -> lp.TokenPruning:
    callback = pruner(**kwargs)
    trainer(callback).validate(unhooked(), loader(8), verbose=False)
    return callback


def test_a_later_run_reuses_the_profile_and_prints_its_date(
    measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = run(), run(verbose=True)
    assert measured == ["profile"]
    assert first.decision.reused == ""
    assert second.decision.reused == first.decision.plan.profile.context["measured"]
    assert second.decision.plan.profile == first.decision.plan.profile
    said = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert f"of {second.decision.reused}, kept; `use_cache=False` measures it again" in said


def test_use_cache_false_neither_reads_nor_keeps_profiles(measured: list[str]) -> None:
    run()
    assert run(use_cache=False).decision.reused == ""
    assert measured == ["profile"] * 2
    run()
    assert measured == ["profile"] * 2


def test_another_config_makes_the_next_run_decide_again_once(measured: list[str]) -> None:
    callback, module = pruner(), unhooked()
    validate = lambda: trainer(callback).validate(module, loader(8), verbose=False)  # noqa: E731
    validate()
    first = callback.decision
    callback.config = replace(callback.config, use_cache=False)
    validate()
    second = callback.decision
    assert second is not first
    validate()
    assert callback.decision is second  # it is kept, also for the epochs of a fit
    assert measured == ["profile"] * 2


def test_cache_dir_is_where_profiles_and_estimates_are_kept(measured: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        run(cache_dir=tmp_path / "mine")
    assert measured == ["profile"]
    names = [path.name for path in (tmp_path / "mine").iterdir()]
    assert (len(names), sum(name.startswith("accuracy-") for name in names)) == (2, 1)


def test_another_batch_size_needs_another_profile_and_another_block_does_not(measured: list[str]) -> None:
    """One curve of the token count serves all blocks."""
    run()
    run(block=2)
    assert measured == ["profile"]
    trainer(pruner()).validate(unhooked(), loader(8, batch_size=2), verbose=False)
    assert measured == ["profile"] * 2


@pytest.mark.parametrize("value", [3, False])
def test_a_cache_dir_that_is_no_path_is_refused(value: Any) -> None:
    with pytest.raises(lp.ArgumentError, match=rf"`cache_dir` .* got {value}"):
        pruner(cache_dir=value)


def test_the_profile_of_a_hooked_model_is_not_kept(measured: list[str]) -> None:
    hooked = Tiny()
    hooked.vit.norm.register_forward_hook(lambda *_: None)
    for _ in range(2):
        with pytest.warns(UserWarning, match="not kept: hooks cannot be compared"):
            trainer(pruner()).validate(hooked, loader(8), verbose=False)
    assert measured == ["profile"] * 2
