"""A kept profile that is reused where it still holds, and measured again otherwise."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lightning_prune as lp
from helpers.clock import set_latency
from helpers.models import tiny_vit
from lightning_prune.profiling import (
    LatencyProfile,
    ProfileStore,
    profile_reuse,
    store_folder,
)
from lightning_prune.profiling.environment import unknown_conditions
from lightning_prune.profiling.profile_reuse import get_or_profile

from .kept import IMAGES, POMT, compiled, dependencies, hooked, profile, with_a_compiled_block, with_a_replaced_method


@pytest.mark.parametrize(
    ("build", "condition"),
    [
        (lambda: compiled(), "runtime"),
        (lambda: compiled(mode="reduce-overhead"), "runtime"),
        (lambda: torch.compile(tiny_vit()), "runtime"),
        (lambda: torch.compile(tiny_vit(), backend=lambda graph, inputs: graph.forward), "runtime"),
        (with_a_compiled_block, "runtime"),
        (lambda: hooked("register_forward_hook"), "hooks"),
        (lambda: hooked("register_forward_pre_hook"), "hooks"),
        (lambda: with_a_replaced_method("forward"), "replaced_methods"),
        (lambda: with_a_replaced_method("forward_features"), "replaced_methods"),
    ],
)
def test_profile_of_a_model_with_the_users_compilation_hooks_or_methods_is_neither_kept_nor_reused(
    tmp_path, monkeypatch, build, condition
):
    """Torch does not tell how a module was compiled, and a hook may take any time."""
    store, model = ProfileStore(tmp_path), build()
    assert unknown_conditions(dependencies(model)) == [condition]
    assert store.put(dependencies(model), profile()) is None
    assert store.get(dependencies(model)) is None
    monkeypatch.setattr(profile_reuse, "profile_latency", lambda *_, **__: profile())
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"not kept: {condition} cannot be compared"):
            assert measure(store, model) == (profile(), False)
    assert not list(tmp_path.iterdir())


def measure(store, model=None, **kwargs):
    return get_or_profile(
        tiny_vit() if model is None else model,
        IMAGES,
        store,
        method=POMT,
        block=1,
        time_limit=0.2,
        verbose=False,
        **kwargs,
    )


@pytest.fixture
def speed(monkeypatch):
    """Milliseconds that a token takes in all blocks; every timed alternative is noted in `timed`."""
    state = SimpleNamespace(ms=4.0, timed=[])

    def seconds(alternative):
        state.timed.append(alternative)
        return 1e-3 * state.ms * (alternative if isinstance(alternative, int) else 17)

    set_latency(monkeypatch, seconds)
    return state


def test_the_second_time_only_the_dense_model_is_timed(tmp_path, speed):
    first = measure(ProfileStore(tmp_path))
    assert not first.reused
    speed.timed.clear()
    assert measure(ProfileStore(tmp_path)) == (first.profile, True)
    assert set(speed.timed) == {"dense"}
    assert len(speed.timed) <= 6  # the first of them warms up; a busy machine has time for fewer


@pytest.mark.parametrize(("factor", "reused"), [(0.5, False), (0.97, True), (1.04, True), (1.1, False)])
def test_a_profile_is_measured_again_where_dense_takes_longer_or_shorter(tmp_path, recwarn, speed, factor, reused):
    first = measure(ProfileStore(tmp_path))
    speed.ms *= factor
    again = measure(ProfileStore(tmp_path))
    assert again.reused == reused
    assert again.profile.dense_ms == pytest.approx(first.profile.dense_ms * (1 if reused else factor))
    lines = [str(warning.message) for warning in recwarn if "measured again" in str(warning.message)]
    assert len(lines) == (not reused)
    assert all("68 (± 0) ms" in line and f"{68 * factor:.3g} (± 0) ms now" in line for line in lines)
    if not reused:  # and the new one is kept in its place
        assert measure(ProfileStore(tmp_path)) == (again.profile, True)


def test_a_profile_that_does_not_hold_is_replaced_by_one_that_has_not_converged(tmp_path, monkeypatch, speed):
    monkeypatch.setattr(LatencyProfile, "is_inconclusive", False)
    first = measure(ProfileStore(tmp_path)).profile
    converged, not_converged = replace(first, converged=True), replace(first, converged=False)
    (entry,) = tmp_path.iterdir()
    document = json.loads(entry.read_text())
    entry.write_text(json.dumps(document | {"profile": converged.to_dict()}))
    speed.ms *= 2
    doubled = replace(not_converged, milliseconds=tuple(2 * ms for ms in first.milliseconds))
    monkeypatch.setattr(profile_reuse, "profile_latency", lambda *_, **__: doubled)
    assert measure(ProfileStore(tmp_path)) == (doubled, False)
    assert measure(ProfileStore(tmp_path)) == (doubled, True)


def test_without_a_home_profiles_are_measured_and_not_kept(monkeypatch):
    def no_home(*_, **__):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv("LIGHTNING_PRUNE_CACHE", raising=False)
    monkeypatch.setattr(store_folder, "user_cache_path", no_home)
    monkeypatch.setattr(profile_reuse, "profile_latency", lambda *_, **__: profile())
    with pytest.warns(UserWarning, match="not kept: could not determine the home directory"):
        store = ProfileStore()
    for _ in range(2):
        assert measure(store) == (profile(), False)


def test_a_folder_that_cannot_be_searched_does_not_end_a_run(tmp_path, monkeypatch):
    def denied(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    def not_written(path, _):
        raise lp.errors.FileWriteError(f"`{path}` cannot be written: Permission denied.")

    monkeypatch.setattr(profile_reuse, "profile_latency", lambda *_, **__: profile())
    monkeypatch.setattr(Path, "exists", denied)
    monkeypatch.setattr(store_folder, "write_document", not_written)
    with pytest.warns(UserWarning, match="Permission denied") as told:
        assert measure(ProfileStore(tmp_path)) == (profile(), False)
    assert len(told) == 2  # reading and writing


def test_inconclusive_profile_is_not_kept(tmp_path, monkeypatch):
    noisy = LatencyProfile((9, 17), (1.0, 2.0), (3.0, 3.0), (5, 5), "pomt", 1, 4)
    assert noisy.is_inconclusive
    monkeypatch.setattr(profile_reuse, "profile_latency", lambda *_, **__: noisy)
    assert measure(ProfileStore(tmp_path)) == (noisy, False)
    assert not list(tmp_path.iterdir())


def test_a_patched_model_is_refused_also_where_its_profile_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(profile_reuse, "profile_latency", lambda *_, **__: profile())
    model = tiny_vit()
    measure(ProfileStore(tmp_path), model)
    with (
        lp.patch(model, "pomt", [0, 4, 0, 0]),
        pytest.raises(lp.ArgumentError, match="`model` must be dense, got a patched model"),
    ):
        measure(ProfileStore(tmp_path), model)


def test_without_a_store_every_time_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(profile_reuse, "profile_latency", lambda *_, **__: profile())
    for _ in range(2):
        assert measure(None) == (profile(), False)
    assert not list(tmp_path.iterdir())
