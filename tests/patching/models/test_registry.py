import importlib
from collections import OrderedDict
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import lightning_prune as lp
from helpers.fresh import run_fresh
from lightning_prune.errors import ArgumentError
from lightning_prune.patching import find_vision_transformer
from lightning_prune.patching.models import MODEL_ADAPTERS
from lightning_prune.patching.models.class_lookup import loaded_class

REMOVED = [0, 6, 5, 0]


class Wrapper(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = next(self.children())(images)
        return output


FACTS = {  # prefix tokens, CLS, tokens, classes
    "vit": (1, True, 26, 7),
    "distilled": (2, True, 27, 7),
    "one-register": (2, True, 27, 7),
    "dinov2-registers": (5, True, 30, 7),
    "registers-without-class": (4, False, 29, 7),
    "siglip": (0, False, 25, 7),
    "no-prefix": (0, False, 25, 7),
    "features": (1, True, 26, 0),
    "dynamic-size": (1, True, None, 7),
}


@pytest.mark.parametrize("name", FACTS)
def test_facts(build: Any, name: str) -> None:
    model = build(name)
    found = find_vision_transformer(model)
    assert (found.num_prefix_tokens, found.has_class_token, found.num_tokens, found.num_classes) == FACTS[name]
    assert found.root is model
    assert found.compiled_root is model
    assert found.patch_embed is model.patch_embed
    assert found.blocks == tuple(model.blocks)
    assert (found.depth, found.embed_dim, found.path, found.compiled_wrapper) == (4, 32, "", None)


class TestFinding:
    def check(self, model: nn.Module, inner: VisionTransformer, path: str, images: Tensor) -> None:
        with torch.no_grad():
            before = model(images)
            with lp.patch(inner, "pomt", REMOVED):
                expected = model(images)
            with lp.patch(model, "pomt", REMOVED) as handle:
                assert handle.transformer.root is inner
                assert handle.transformer.path == path
                assert torch.equal(model(images), expected)
            assert torch.equal(model(images), before)
        assert not torch.equal(expected, before)

    def test_in_a_module(self, build: Any, images: Tensor) -> None:
        inner = build()
        self.check(Wrapper(net=inner, other=nn.Linear(2, 2)), inner, "net", images)

    def test_in_a_sequential(self, build: Any, images: Tensor) -> None:
        inner = build("features")
        self.check(nn.Sequential(nn.Identity(), inner, nn.Linear(32, 3)), inner, "1", images)

    def test_deep(self, build: Any, images: Tensor) -> None:
        inner = build()
        self.check(Wrapper(a=Wrapper(b=nn.Sequential(OrderedDict(c=inner)))), inner, "a.b.c", images)

    def test_compiled(self, build: Any, images: Tensor) -> None:
        inner = build()
        model = torch.compile(inner, backend="eager")
        self.check(model, inner, "_orig_mod", images)
        found = find_vision_transformer(model)
        assert found.compiled_wrapper is model
        assert found.compiled_root is model

    def test_compiled_in_a_module(self, build: Any, images: Tensor) -> None:
        inner = build()
        compiled = torch.compile(inner, backend="eager")
        model = Wrapper(net=compiled)
        self.check(model, inner, "net._orig_mod", images)
        assert find_vision_transformer(model).compiled_root is compiled

    def test_a_subclass_of_the_user(self, build: Any, images: Tensor) -> None:
        class Mine(VisionTransformer):
            pass

        inner = build(kind=Mine)
        self.check(inner, inner, "", images)

    def test_one_transformer_under_two_names_is_one(self, build: Any, images: Tensor) -> None:
        inner = build()
        self.check(Wrapper(student=inner, teacher=inner), inner, "student", images)

    def test_a_transformer_in_a_transformer_belongs_to_it(self, build: Any, images: Tensor) -> None:
        inner = build()
        inner.aside = build()
        self.check(inner, inner, "", images)

    def test_module_path_selects_the_transformer(self, build: Any, images: Tensor) -> None:
        student, teacher = build(), build(seed=1)
        model = Wrapper(student=student, teacher=teacher)
        classes = [type(b) for b in student.blocks]
        with lp.patch(model, "pomt", REMOVED, module_path="teacher") as handle:
            assert handle.transformer.root is teacher
            assert handle.transformer.path == "teacher"
            assert [type(b) for b in student.blocks] == classes

    def test_module_path_of_a_parent(self, build: Any) -> None:
        teacher = build()
        model = Wrapper(student=build(), rest=nn.Sequential(teacher))
        found = find_vision_transformer(model, module_path="rest")
        assert found.root is teacher
        assert found.path == "rest.0"

    def test_a_patched_transformer_is_found(self, build: Any) -> None:
        model = build()
        with lp.patch(model, "pomt", REMOVED):
            assert find_vision_transformer(Wrapper(net=model)).root is model


class TestErrors:
    def test_no_transformer(self) -> None:
        message = (
            r"`model` must contain one of timm VisionTransformer, timm Eva, .*torchvision "
            r"VisionTransformer, .*Hugging Face CLIP.*, got Sequential with Linear, ReLU\."
        )
        with pytest.raises(lp.UnsupportedModelError, match=message):
            lp.patch(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), "pomt", REMOVED)

    def test_an_empty_module(self) -> None:
        with pytest.raises(lp.UnsupportedModelError, match=r"got Identity with no modules\."):
            lp.patch(nn.Identity(), "pomt", REMOVED)

    @pytest.mark.parametrize("model", [None, "vit_tiny_patch16_224", torch.ones(1)])
    def test_other_objects_are_rejected(self, model: Any) -> None:
        message = rf"`model` must be a torch\.nn\.Module, got {type(model).__name__}\."
        with pytest.raises(lp.UnsupportedModelError, match=message):
            lp.patch(model, "pomt", REMOVED)

    def test_two_transformers_are_listed(self, build: Any) -> None:
        model = Wrapper(student=build(), teacher=build("distilled"))
        message = (
            r"`module_path` must be one of 'student' \(VisionTransformer\), "
            r"'teacher' \(VisionTransformerDistilled\), because .*, got None\."
        )
        with pytest.raises(lp.UnsupportedModelError, match=message):
            lp.patch(model, "pomt", REMOVED)
        lp.patch(model, "pomt", REMOVED, module_path="student")
        with pytest.raises(lp.UnsupportedModelError, match=message):
            lp.patch(model, "pomt", REMOVED)

    def test_an_unknown_module_path_is_rejected(self, build: Any) -> None:
        message = r"`module_path` must be the dotted path of a module in Wrapper, got 'nett'\."
        with pytest.raises(ArgumentError, match=message):
            lp.patch(Wrapper(net=build()), "pomt", REMOVED, module_path="nett")

    def test_a_module_path_without_a_transformer_is_rejected(self, build: Any) -> None:
        with pytest.raises(lp.UnsupportedModelError, match=r"`model` must contain .*, got Linear with no modules"):
            lp.patch(Wrapper(net=build(), head=nn.Linear(2, 2)), "pomt", REMOVED, module_path="head")

    def test_patch_dropout_in_training_is_rejected(self, build: Any) -> None:
        model = build("patch-drop").train()
        with pytest.raises(lp.UnsupportedModelError, match=r"\(patch_drop_rate\)\. Call `\.eval\(\)` first\."):
            lp.patch(model, "pomt", REMOVED)
        model.eval()
        lp.patch(model, "pomt", REMOVED).remove()


class TestImageSizes:
    @pytest.mark.parametrize("method", ["pomt", "random"])
    def test_a_dynamic_model_works_at_each_size(self, build: Any, draw: Any, leaving: Any, method: str) -> None:
        with lp.patch(build("dynamic-size"), method, REMOVED) as handle:
            model = handle.transformer.root
            assert leaving(model, draw(size=20)) == (26, 20, 15, 15)
            assert leaving(model, draw(size=28)) == (50, 44, 39, 39)
            assert leaving(model, draw(size=16)) == (17, 11, 6, 6)

    @pytest.mark.usefixtures("no_mode_left")
    def test_the_schedule_is_checked_in_forward(self, build: Any, draw: Any, leaving: Any) -> None:
        model = build("dynamic-size")
        with lp.patch(model, "pomt", [0, 6, 12, 0]):
            assert leaving(model, draw(size=20)) == (26, 20, 8, 8)
            message = r"at most 8 of the 11 tokens that enter block 2 with pomt, got 12\."
            with pytest.raises(lp.ScheduleError, match=message):
                model(draw(size=16))
            assert leaving(model, draw(size=20)) == (26, 20, 8, 8)

    def test_depth_is_checked_when_patching(self, build: Any) -> None:
        with pytest.raises(lp.ScheduleError, match="must have 4 blocks, as the model, got 3"):
            lp.patch(build("dynamic-size"), "pomt", [1, 0, 0])


class TestGridGuard:
    def test_grid_outputs_are_rejected(self, build: Any, images: Tensor) -> None:
        """9 of 25 tokens would silently be reshaped to a 3 x 3 grid."""
        model = build("no-prefix")
        message = r"`output_fmt` must be 'NLC' .* got 'NCHW'"
        with lp.patch(model, "random", [16, 0, 0, 0]):
            for call in (
                lambda: model.forward_intermediates(images),
                lambda: model.forward_intermediates(images, output_fmt="NCHW"),
                lambda: model.forward_intermediates(images, None, False, False, False, "NCHW"),
                lambda: model.get_intermediate_layers(images, 2, reshape=True),
            ):
                with pytest.raises(lp.UnsupportedModelError, match=message):
                    call()
        assert model.forward_intermediates(images)[1][0].shape == (2, 32, 5, 5)

    def test_sequence_outputs_are_returned(self, build: Any, images: Tensor) -> None:
        model = build()
        with lp.patch(model, "pomt", REMOVED), torch.no_grad():
            last, between = model.forward_intermediates(images, output_fmt="NLC")
            assert [x.shape[1] for x in between] == [25, 19, 14, 14]
            assert torch.equal(last, model.forward_features(images))
            assert model.forward_intermediates(images, None, False, False, False, "NLC")[0].shape == (2, 15, 32)
            assert model.get_intermediate_layers(images, 1)[0].shape == (2, 14, 32)


def test_a_shared_block_is_rejected(build: Any) -> None:
    model = build()
    model.blocks[2] = model.blocks[1]
    with pytest.raises(lp.UnsupportedModelError, match="got one module at several depths"):
        lp.patch(model, "pomt", [0, 2, 0, 0])


@pytest.mark.parametrize(
    ("module", "removed", "adapter"),
    [
        ("timm.models.cait", ["Cait"], "timm Cait"),
        ("timm.models.cait", ["TalkingHeadAttn"], "timm Cait"),
        ("timm.models.eva", ["Eva", "EvaAttention", "EvaBlock"], "timm Eva"),
        ("timm.models.naflexvit", ["NaFlexVit"], "timm NaFlexVit"),
        ("timm.models.beit", ["Beit", "Block"], "timm Beit and VisionTransformerRelPos"),
        ("torchvision.models.vision_transformer", ["VisionTransformer"], "torchvision VisionTransformer"),
    ],
)
def test_a_renamed_class_disables_only_its_adapter(module: str, removed: list[str], adapter: str) -> None:
    """Classes of other libraries, which are not imported."""
    code = f"""
import {module} as renamed
for name in {removed!r}:
    delattr(renamed, name)
import timm, torch
import lightning_prune as lp
model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32).eval()
with lp.patch(model, "tome", 2) as handle:
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)
    print(handle.transformer.adapter.name)
print([adapter.name for adapter in lp.patching.models.MODEL_ADAPTERS])
"""
    done = run_fresh(code)
    assert done.returncode == 0, done.stderr
    used, known = done.stdout.splitlines()
    assert used == "timm VisionTransformer"
    assert adapter in known


@pytest.mark.parametrize(
    "name", [name for each in MODEL_ADAPTERS for name in getattr(each, "roots", ()) if ":" in name]
)
def test_all_classes_of_the_adapters_exist(name: str) -> None:
    importlib.import_module(name.partition(":")[0])
    assert loaded_class(name) is not None
