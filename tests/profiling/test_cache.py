import importlib.metadata
import importlib.util
import json
import linecache
import multiprocessing
import sys
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lightning_prune as lp
from helpers.clock import set_latency
from helpers.data import noise_images
from helpers.models import tiny_hugging_face_vit, tiny_torchvision_vit, tiny_vit
from lightning_prune.patching import find_vision_transformer
from lightning_prune.patching.models.base import calling_with
from lightning_prune.profiling import (
    LatencyProfile,
    ProfileStore,
    cache,
    environment,
    measurement_context,
    profile_dependencies,
)
from lightning_prune.profiling.cache import get_or_profile
from lightning_prune.profiling.environment import runtime_name, structure, unknown_conditions
from lightning_prune.reduction import resolve
from lightning_prune.runtimes.torch_runtime import Compiled

IMAGES = noise_images(2)
POMT = resolve("pomt")


def unfused(model):
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


def profile(ms=1.0, **changes):
    context = measurement_context(tiny_vit(), IMAGES) | {"measured": "once"}
    curve = LatencyProfile((9, 17), (ms, 2.0), (0.01, 0.01), (9, 9), "pomt", 1, 4, context=context)
    return replace(curve, **changes)


def dependencies(model=None, images=IMAGES, method=POMT, block=1):
    model = tiny_vit() if model is None else model
    return profile_dependencies(find_vision_transformer(model), images, method, block)


def test_profile_is_found_again_under_the_same_conditions(tmp_path):
    store = ProfileStore(tmp_path / "new" / "folder")
    assert store.get(dependencies()) is None
    store.put(dependencies(), profile())
    assert store.get(dependencies()) == profile()
    assert ProfileStore(tmp_path / "new" / "folder").get(dependencies(tiny_vit())) == profile()


@pytest.mark.parametrize(
    "other",
    [
        {"images": IMAGES[:1]},
        {"images": IMAGES.bfloat16()},
        {"model": tiny_vit(depth=5)},
        {"model": tiny_vit(embed_dim=64)},
        {"model": tiny_vit(qk_norm=True)},
        {"model": tiny_vit(num_heads=4)},
        {"model": unfused(tiny_vit())},
        {"images": IMAGES.contiguous(memory_format=torch.channels_last)},
        {"model": tiny_vit().bfloat16()},
        {"method": resolve("topk")},
        {"method": lp.reduction.ToMe(proportional_attention=False)},
        {"block": 2},
    ],
)
def test_any_other_condition_is_another_profile(tmp_path, other):
    store = ProfileStore(tmp_path)
    store.put(dependencies(), profile())
    assert store.get(dependencies(**other)) is None


@contextmanager
def switched(place, name, value):
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


@contextmanager
def called(change, value, before):
    change(value)
    try:
        yield
    finally:
        change(before)


@pytest.mark.parametrize(
    "other",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: called(torch.set_float32_matmul_precision, "medium", torch.get_float32_matmul_precision()),
        lambda: called(torch.set_num_threads, torch.get_num_threads() + 1, torch.get_num_threads()),
        lambda: called(torch.backends.cuda.enable_cudnn_sdp, False, True),
        lambda: torch.backends.mkldnn.flags(enabled=False),
        lambda: switched(torch.backends.cudnn, "benchmark", True),
        lambda: switched(torch.backends.cudnn, "allow_tf32", False),
        lambda: switched(environment, "version", lambda package: "0.1"),
    ],
    ids=["autocast", "matmul", "threads", "attention", "mkldnn", "benchmark", "tf32", "timm"],
)
def test_any_other_state_of_torch_is_another_profile(tmp_path, other):
    store = ProfileStore(tmp_path)
    store.put(dependencies(), profile())
    with other():
        assert store.get(dependencies()) is None
    assert store.get(dependencies()) is not None


def test_switch_used_in_its_newer_form_is_read_as_unknown(monkeypatch):
    """Torch refuses to say the older form once the newer was used."""

    def mixed():
        raise RuntimeError("you have used mix of the legacy and new APIs")

    before = dependencies()["kernels"]["matmul_precision"]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    assert before is not None
    assert dependencies()["kernels"]["matmul_precision"] is None


def by_us(mode):
    model = tiny_vit()
    Compiled(model, mode, list(model.blocks))
    return model


def compiled(**kwargs):
    model = tiny_vit()
    model.compile(**kwargs)
    return model


def with_a_compiled_block():
    model = tiny_vit()
    model.blocks[1].compile(backend="eager")
    return model


def hooked(method):
    model = tiny_vit()
    getattr(model.blocks[2].mlp, method)(lambda *_: None)
    return model


def test_each_mode_of_compilation_is_another_profile(tmp_path):
    store = ProfileStore(tmp_path)
    models = {mode: by_us(mode) for mode in ("default", "reduce-overhead", "blocks")}
    for mode, model in models.items():
        name = "torch.compile" if mode == "default" else f"torch.compile:mode={mode}"
        assert runtime_name(model) == dependencies(model)["runtime"] == name
        assert store.get(dependencies(model)) is None
        assert store.put(dependencies(model), profile(context=measurement_context(model, IMAGES))) is not None
    assert dependencies()["runtime"] == "torch"
    assert all(store.get(dependencies(model)) is not None for model in models.values())
    undone = tiny_vit()
    Compiled(undone, "default").undo()
    assert runtime_name(undone) == "torch"


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
    ],
)
def test_profile_of_a_model_with_the_users_compilation_or_hooks_is_neither_kept_nor_reused(
    tmp_path, monkeypatch, build, condition
):
    """Torch does not tell how a module was compiled, and a hook may take any time."""
    store, model = ProfileStore(tmp_path), build()
    assert unknown_conditions(dependencies(model)) == [condition]
    assert store.put(dependencies(model), profile()) is None
    assert store.get(dependencies(model)) is None
    monkeypatch.setattr(cache, "profile_latency", lambda *_, **__: profile())
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"not kept: {condition} cannot be compared"):
            assert measure(store, model) == (profile(), False)
    assert not list(tmp_path.iterdir())


def test_hooks_of_the_libraries_are_known():
    """transformers installs some by itself, where hidden states are asked for."""
    model = tiny_hugging_face_vit("ViTModel")
    model(IMAGES, output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    assert dependencies(model)["hooks"] == ""


def mine(tmp_path, text):
    """A method of that name, from a file of the user's."""
    (tmp_path / "mine.py").write_text(text)
    spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mine"] = module
    linecache.checkcache()
    spec.loader.exec_module(module)
    return module.Mine()


def test_methods_that_share_a_name_do_not_share_a_profile(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", None)
    text = "from lightning_prune.reduction import {0}\n\nclass Mine({0}):\n    name = 'mine'\n"
    keys = [dependencies(method=mine(tmp_path, text.format(base)))["method_class"] for base in ("TopK", "EViT")]
    edited = dependencies(method=mine(tmp_path, text.format("EViT") + "    # another\n"))["method_class"]
    assert len({*keys, edited}) == 3
    assert all(key.startswith("mine.Mine ") for key in keys)
    again = dependencies(method=mine(tmp_path, text.format("TopK")))["method_class"]
    assert again == keys[0]


def test_a_method_without_source_is_measured_every_time(tmp_path):
    nowhere = type("Nowhere", (lp.reduction.TopK,), {"name": "nowhere", "__module__": "a_console"})()
    assert dependencies(method=nowhere)["method_class"] == "unknown"


def test_profile_depends_on_classes_and_not_on_weights():
    model, trained = tiny_vit(), tiny_vit()
    with torch.no_grad():
        trained.head.weight.add_(1.0)
    assert structure(model) == structure(trained)
    trained.train()
    assert structure(model) == structure(trained)
    trained.blocks[0].mlp.act = torch.nn.ReLU()
    assert structure(model) != structure(trained)


def test_profile_depends_on_the_configuration_of_hugging_face() -> None:
    import transformers

    plain = structure(tiny_hugging_face_vit())
    assert structure(tiny_hugging_face_vit()) == plain
    assert structure(tiny_hugging_face_vit(num_attention_heads=4)) != plain
    assert structure(tiny_hugging_face_vit(attn_implementation="eager")) != plain
    found = profile_dependencies(find_vision_transformer(tiny_hugging_face_vit()), IMAGES, POMT, 1)
    assert found["packages"]["transformers"] == transformers.__version__


def test_a_profile_that_was_given_less_time_is_measured_again(tmp_path):
    store = ProfileStore(tmp_path)
    store.put(dependencies(), profile(), time_limit=5.0)
    assert store.get(dependencies(), time_limit=5.0) is not None
    assert store.get(dependencies(), time_limit=2.0) is not None
    assert store.get(dependencies(), time_limit=30.0) is None
    assert store.get(dependencies(), time_limit=None) is None
    store.put(dependencies(), profile(converged=True), time_limit=5.0)
    assert store.get(dependencies(), time_limit=30.0) is not None


def test_without_a_limit_other_counts_are_measured_than_with_one(tmp_path):
    store = ProfileStore(tmp_path)
    store.put(dependencies(), profile(), time_limit=None)
    assert store.get(dependencies(), time_limit=None) is not None
    assert store.get(dependencies(), time_limit=1.0) is None


@pytest.mark.parametrize(
    ("there", "new", "stays"),
    [
        ((30.0, False), (1.0, False), True),
        ((30.0, True), (60.0, False), True),
        ((30.0, False), (None, False), True),
        ((30.0, False), (30.0, False), False),
        ((30.0, False), (1.0, True), False),
        ((1.0, True), (30.0, True), False),
        ((None, False), (1.0, False), False),
    ],
)
def test_a_better_entry_stays(tmp_path, there, new, stays):
    store = ProfileStore(tmp_path)
    store.put(dependencies(), profile(1.0, converged=there[1]), there[0])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        path = store.put(dependencies(), profile(1.5, converged=new[1]), new[0])
    assert (path is None) == stays
    assert [str(each.message).startswith("The profile in ") for each in told] == [True] * stays
    kept = there if stays else new
    assert store.get(dependencies(), kept[0]).milliseconds[0] == (1.0 if stays else 1.5)


def changed(text, **entries):
    document = json.loads(text)
    return json.dumps({**document, "profile": {**document["profile"], **entries}})


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: json.dumps({**json.loads(text), "profile": {}}),
        lambda text: json.dumps({**json.loads(text), "profile": 3}),
        lambda text: json.dumps({**json.loads(text), "version": 99}),
        lambda text: json.dumps({**json.loads(text), "dependencies": {"device": "Abacus"}}),
        lambda text: json.dumps({"format": "lightning_prune.schedule", "version": 1}),
        lambda text: json.dumps({**json.loads(text), "time_limit": "30"}),
        lambda text: changed(text, rounds=[0, 9]),
        lambda text: changed(text, context=None),
        lambda text: changed(text, context={}),
        lambda text: changed(text, spread=[float("nan"), 0.1]),
        lambda text: changed(text, spread=[-1, 0.1]),
        lambda text: changed(text, milliseconds=[True, 2]),
        lambda text: changed(text, method=3),
        lambda text: changed(text, method="tome"),
        lambda text: changed(text, block=2),
        lambda text: changed(text, depth=12),
        lambda text: changed(text, protocol="paper"),
        lambda text: changed(text, seconds="x"),
    ],
)
def test_damaged_or_foreign_entry_is_skipped_with_a_warning(tmp_path, damage):
    store = ProfileStore(tmp_path)
    path = store.put(dependencies(), profile())
    path.write_text(damage(path.read_text()))
    with pytest.warns(UserWarning, match=f"is skipped and will be measured again and replaced: .*{path.name}"):
        assert store.get(dependencies()) is None
    store.put(dependencies(), profile())
    assert store.get(dependencies()) == profile()


def test_folder_that_cannot_be_written_to_leads_to_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    store = ProfileStore(tmp_path / "file")
    with pytest.warns(UserWarning, match="not kept for other runs: Cannot write .*file"):
        assert store.put(dependencies(), profile()) is None
    assert store.get(dependencies()) is None


def _write(folder, conditions, ms):
    for _ in range(50):
        ProfileStore(folder).put(conditions, profile(ms))


def test_two_processes_at_once_leave_one_whole_entry(tmp_path):
    conditions = dependencies()
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path, conditions, ms)) for ms in (1.0, 1.5)]
    for writer in writers:
        writer.start()
    store = ProfileStore(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while any(writer.is_alive() for writer in writers):
            assert store.get(conditions) in (None, profile(1.0), profile(1.5))
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 1


def test_the_folder_is_that_of_the_environment_or_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", str(tmp_path))
    assert ProfileStore().folder == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", "~/mine")
    assert ProfileStore().folder == tmp_path / "mine"
    assert ProfileStore("~/other").folder == tmp_path / "other"
    monkeypatch.delenv("LIGHTNING_PRUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert ProfileStore().folder == tmp_path / "cache" / "lightning_prune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    caches = {"linux": ".cache", "darwin": "Library/Caches"}
    if sys.platform in caches:
        assert ProfileStore().folder == tmp_path / caches[sys.platform] / "lightning_prune"


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
    assert speed.timed == ["dense"] * 6  # the first of them warms up


@pytest.mark.parametrize(("factor", "reused"), [(0.5, False), (0.7, True), (1.4, True), (1.6, False)])
def test_a_profile_is_measured_again_where_dense_takes_much_longer_or_shorter(tmp_path, recwarn, speed, factor, reused):
    first = measure(ProfileStore(tmp_path))
    speed.ms *= factor
    again = measure(ProfileStore(tmp_path))
    assert again.reused == reused
    assert again.profile.dense_ms == pytest.approx(first.profile.dense_ms * (1 if reused else factor))
    lines = [str(warning.message) for warning in recwarn if "measured again" in str(warning.message)]
    assert len(lines) == (not reused)
    assert all("68 ms" in line and f"{68 * factor:.3g} ms" in line for line in lines)
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
    monkeypatch.setattr(cache, "profile_latency", lambda *_, **__: doubled)
    assert measure(ProfileStore(tmp_path)) == (doubled, False)
    assert measure(ProfileStore(tmp_path)) == (doubled, True)


def test_without_a_home_profiles_are_measured_and_not_kept(monkeypatch):
    def no_home(*_, **__):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv("LIGHTNING_PRUNE_CACHE", raising=False)
    monkeypatch.setattr(cache, "user_cache_path", no_home)
    monkeypatch.setattr(cache, "profile_latency", lambda *_, **__: profile())
    with pytest.warns(UserWarning, match="not kept: could not determine the home directory"):
        store = ProfileStore()
    for _ in range(2):
        assert measure(store) == (profile(), False)


def test_a_folder_that_cannot_be_searched_does_not_end_a_run(tmp_path, monkeypatch):
    def denied(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    def not_written(path, _):
        raise lp.errors.FileWriteError(f"`{path}` cannot be written: Permission denied.")

    monkeypatch.setattr(cache, "profile_latency", lambda *_, **__: profile())
    monkeypatch.setattr(Path, "exists", denied)
    monkeypatch.setattr(cache, "write_document", not_written)
    with pytest.warns(UserWarning, match="Permission denied") as told:
        assert measure(ProfileStore(tmp_path)) == (profile(), False)
    assert len(told) == 2  # reading and writing


def test_arguments_of_the_call_are_conditions_and_tensors_among_them_are_unknown():
    model = tiny_vit()
    plain = dependencies(model)
    with calling_with(model, {"passes": 2}):
        twice = dependencies(model)
    assert twice["arguments"] == {"passes": "2"} != plain["arguments"]
    assert "arguments" not in unknown_conditions(twice)
    with calling_with(model, {"passes": 2, "mask": torch.ones(2)}):
        assert "arguments" in unknown_conditions(dependencies(model))


def test_sparse_weights_are_part_of_the_structure():
    model, sparse = tiny_vit(), tiny_vit()
    weight = sparse.blocks[0].mlp.fc1.weight
    sparse.blocks[0].mlp.fc1.weight = torch.nn.Parameter(weight.detach().to_sparse_csr(), requires_grad=False)
    assert dependencies(model)["structure"] != dependencies(sparse)["structure"]


def test_inconclusive_profile_is_not_kept(tmp_path, monkeypatch):
    noisy = LatencyProfile((9, 17), (1.0, 2.0), (3.0, 3.0), (5, 5), "pomt", 1, 4)
    assert noisy.is_inconclusive
    monkeypatch.setattr(cache, "profile_latency", lambda *_, **__: noisy)
    assert measure(ProfileStore(tmp_path)) == (noisy, False)
    assert not list(tmp_path.iterdir())


def test_a_patched_model_is_refused_also_where_its_profile_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "profile_latency", lambda *_, **__: profile())
    model = tiny_vit()
    measure(ProfileStore(tmp_path), model)
    with (
        lp.patch(model, "pomt", [0, 4, 0, 0]),
        pytest.raises(lp.ArgumentError, match="`model` must be dense, got a patched model"),
    ):
        measure(ProfileStore(tmp_path), model)


def test_without_a_store_every_time_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_PRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "profile_latency", lambda *_, **__: profile())
    for _ in range(2):
        assert measure(None) == (profile(), False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("build", "libraries"),
    [
        (tiny_vit, {"timm"}),
        (tiny_torchvision_vit, {"torchvision"}),
        (lambda: tiny_hugging_face_vit("ViTModel"), {"transformers"}),
    ],
)
def test_versions_are_those_of_the_libraries_of_the_model(build, libraries):
    context = measurement_context(build(), IMAGES)
    assert {"timm", "torchvision", "transformers"} & set(context) == libraries
    assert all(context[name] == importlib.metadata.version(name) for name in libraries)
