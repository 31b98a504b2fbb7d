import importlib.metadata
import importlib.util
import json
import linecache
import multiprocessing
import sys
import warnings
from contextlib import contextmanager

import pytest
import torch

import lightning_prune as lp
from helpers.models import tiny_hugging_face_vit, tiny_torchvision_vit, tiny_vit
from lightning_prune.patching import find_vision_transformer
from lightning_prune.patching.models.call_arguments import calling_with
from lightning_prune.profiling import (
    ProfileStore,
    environment,
    measurement_context,
    profile_dependencies,
)
from lightning_prune.profiling.environment import runtime_name, unknown_conditions
from lightning_prune.profiling.model_identity import structure
from lightning_prune.reduction import resolve
from lightning_prune.runtimes.torch_runtime import Compiled

from .kept import IMAGES, POMT, by_us, dependencies, profile


def unfused(model):
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


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
        lambda: switched(environment, "_installed_version", lambda package: "0.1"),
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


def test_profile_depends_on_adapters_that_are_on_or_off_and_not_on_counters():
    """Libraries of adapters keep a private switch, `_disable_adapters` for example."""
    model = tiny_vit()
    layer = model.blocks[0].mlp.fc1
    layer._disable_adapters, layer._active_adapter, layer._calls = False, ["default"], 1
    on = structure(model)
    layer._calls = 2
    assert structure(model) == on
    layer._disable_adapters = True
    off = structure(model)
    layer._active_adapter = ["other"]
    assert len({on, off, structure(model)}) == 3


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
    assert len(told) == stays
    for each in told:
        limits = [str(each.message).find(f"(time_limit={entry[0]})") for entry in (new, there)]
        assert -1 < limits[0] < limits[1]  # what this run uses, and what stays
        assert ("converged" in str(each.message)) == there[1]
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
