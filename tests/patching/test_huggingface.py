"""ViT, DeiT, DINOv2, DINOv3, CLIP and SigLIP of Hugging Face's transformers."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lightning_prune as lp
from helpers import reference as naive
from helpers.fresh import run_fresh
from helpers.models import disturb
from lightning_prune.patching import find_vision_transformer

from .by_hand import looped, pruned_by_hand
from .huggingface_models import (
    KINDS,
    METHODS,
    MODELS,
    SMALL,
    WHERE,
    blocks_of,
    build_hf,
    every_kind,
    every_method,
    every_model,
    last_tokens,
    outputs_of,
    parts_of,
    run,
)


class TestFacts:
    @every_model
    def test_facts(self, images: Tensor, name: str) -> None:
        model, facts = build_hf(name), MODELS[name]
        found = find_vision_transformer(nn.Sequential(model))
        assert (found.num_prefix_tokens, found.has_class_token, found.num_tokens) == facts[:3]
        assert found.num_classes == (facts.width if facts.logits else 0)
        assert found.has_position_inputs is facts.has_position_inputs
        assert (found.root, found.path, found.embed_dim, found.depth) == (model, "0", 32, 4)
        assert list(found.blocks) == blocks_of(model)
        assert found.patch_embed is next(m for key, m in model.named_modules() if key.split(".")[-1] == "embeddings")
        assert torch.equal(found.outputs(images), run(model, images))
        assert found.outputs(images).shape == (2, facts.width)

    @every_model
    def test_tuple_outputs_are_supported(self, images: Tensor, name: str) -> None:
        model = build_hf(name)
        found = find_vision_transformer(model)
        with torch.no_grad():
            assert torch.equal(found.adapter.output(model(images, return_dict=False)), run(model, images))

    @pytest.mark.parametrize("return_dict", [True, False])
    def test_without_a_pooler(self, images: Tensor, return_dict: bool) -> None:
        model = transformers.ViTModel(transformers.ViTConfig(**SMALL), add_pooling_layer=False).eval()
        model.config.return_dict = return_dict
        tokens = model(images)[0]
        assert torch.equal(find_vision_transformer(model).outputs(images), tokens[:, 0])
        model = build_hf("SiglipVisionModel", vision_use_head=False)
        model.config.return_dict = return_dict
        tokens = model(images)[0]
        assert torch.equal(find_vision_transformer(model).outputs(images), tokens.mean(dim=1))

    def test_replaced_heads_are_supported(self) -> None:
        model = build_hf("ViTForImageClassification")
        model.classifier = nn.Linear(32, 3)
        assert find_vision_transformer(model).num_classes == 3
        model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(32, 7))
        assert find_vision_transformer(model).num_classes == 7
        assert find_vision_transformer(build_hf("ViTForImageClassification", num_labels=0)).num_classes == 0

    def test_non_square_images(self) -> None:
        model = build_hf("ViTModel", image_size=(12, 20), patch_size=(4, 2))
        assert find_vision_transformer(model).num_tokens == 1 + 3 * 10

    @pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
    def test_the_vision_tower_is_found(self, images: Tensor, name: str) -> None:
        model = build_hf(name)
        text = torch.randint(3, 40, (2, 8), generator=torch.Generator().manual_seed(0))
        classes = [type(m) for m in model.text_model.modules()]
        with torch.no_grad():
            before = model(input_ids=text, pixel_values=images)
            with lp.patch(model, "pomt", WHERE["two"]) as handle:
                assert handle.transformer.root is model.vision_model
                assert handle.transformer.path == "vision_model"
                assert [type(m) for m in model.text_model.modules()] == classes
                pruned = model(input_ids=text, pixel_values=images)
                image = run(model.vision_model, images)
            after = model(input_ids=text, pixel_values=images)
        assert torch.equal(pruned.text_embeds, before.text_embeds)
        assert not torch.equal(pruned.image_embeds, before.image_embeds)
        projected = image if name == "SiglipModel" else model.visual_projection(image)
        torch.testing.assert_close(pruned.image_embeds, F.normalize(projected, dim=-1))
        assert torch.equal(after.logits_per_image, before.logits_per_image)

    def test_the_text_tower_is_rejected(self) -> None:
        with pytest.raises(lp.UnsupportedModelError, match=r"contain .*Hugging Face CLIP, .*, got CLIPTextModel with"):
            lp.patch(build_hf("CLIPModel").text_model, "random", WHERE["one"])

    def test_a_subclass_of_the_user(self, images: Tensor) -> None:
        class Mine(transformers.ViTForImageClassification):
            def forward(self, pixel_values: Tensor) -> Tensor:
                logits: Tensor = super().forward(pixel_values).logits
                return logits

        model: Any = disturb(Mine(transformers.ViTConfig(**SMALL, num_labels=7)))
        found = find_vision_transformer(model)
        with lp.patch(model, "pomt", WHERE["one"]) as handle, torch.no_grad():
            assert handle.transformer.root is model
            assert torch.equal(found.outputs(images), model(images))

    @pytest.mark.long
    def test_transformers_is_not_imported(self) -> None:
        """Also not by searching models of other libraries."""
        code = (
            "import sys, torch.nn as nn, lightning_prune as lp\n"
            "try:\n    lp.patch(nn.Linear(2, 2), 'pomt', [1])\n"
            "except lp.UnsupportedModelError as error:\n    assert 'Hugging Face ViT' in str(error)\n"
            "else:\n    raise SystemExit('found one')\n"
            "raise SystemExit('imported' if 'transformers.models' in sys.modules else 0)"
        )
        done = run_fresh(code)
        assert done.returncode == 0, done.stderr


class TestRestoration:
    @every_model
    @pytest.mark.parametrize("method", ["pomt", "random"])
    def test_removal_and_copies(self, images: Tensor, name: str, method: str) -> None:
        model = build_hf(name)
        before, keys, classes = run(model, images), list(model.state_dict()), [type(m) for m in model.modules()]
        attributes = [set(vars(m)) for m in model.modules()]
        with lp.patch(model, METHODS[method], [0, 0, 0, 0]):
            assert torch.equal(run(model, images), before)
        with lp.patch(model, METHODS[method], WHERE["two"]):
            pruned = run(model, images)
            assert not torch.equal(pruned, before)
            assert list(model.state_dict()) == keys
            assert torch.equal(run(copy.deepcopy(model), images), pruned)
            assert torch.equal(run(pickle.loads(pickle.dumps(model)), images), pruned)
        assert torch.equal(run(model, images), before)
        assert [type(m) for m in model.modules()] == classes
        assert [set(vars(m)) for m in model.modules()] == attributes

    @every_kind
    def test_saved_while_patched(self, images: Tensor, name: str, tmp_path: Path) -> None:
        model = build_hf(name)
        expected = run(model, images)
        model.save_pretrained(tmp_path / "before")
        with lp.patch(model, "pomt", WHERE["two"]):
            model.save_pretrained(tmp_path / "patched")
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / "patched" / file).read_bytes() == (tmp_path / "before" / file).read_bytes()
        loaded = type(model).from_pretrained(tmp_path / "patched").eval()
        assert torch.equal(run(loaded, images), expected)

    @every_kind
    def test_blocks_are_split_bit_identically(self, name: str, caplog: pytest.LogCaptureFixture) -> None:
        """Bit-identical, so nothing is logged about blocks that cannot be split."""
        with caplog.at_level("INFO", "lightning_prune"):
            lp.patch(build_hf(name), "pomt", [3, 3, 3, 3])
        assert caplog.messages == []


class Hide(TorchFunctionMode):
    """Adds -inf to the logits of selected keys, different ones in each attention call."""

    def __init__(self, gone: list[list[int]]) -> None:
        super().__init__()
        self.gone, self.call = gone, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.call < len(self.gone):
            mask = torch.zeros(1, 1, 1, args[1].shape[2], dtype=args[1].dtype)
            mask[..., self.gone[self.call]] = float("-inf")
            self.call, kwargs = self.call + 1, {**kwargs, "attn_mask": mask}
        return func(*args, **kwargs)


class TestNumbers:
    @pytest.mark.parametrize(
        ("name", "where"), [*((name, "two") for name in MODELS), *((name, "one") for name in KINDS)]
    )
    @every_method
    def test_matches_by_hand(self, images: Tensor, relative_error: Any, name: str, method: str, where: str) -> None:
        model, removed = build_hf(name), WHERE[where]
        prefix = MODELS[name].prefix
        expected = pruned_by_hand(model, images, removed, looped(method), prefix, blocks_of, parts_of, outputs_of)
        with lp.patch(model, METHODS[method], removed):
            assert relative_error(run(model, images), expected) < 1e-5
        model = model.double()
        with lp.patch(model, METHODS[method], removed):
            for _ in range(2):  # nothing is left of the pass before
                assert relative_error(run(model, images.double()), expected) < 1e-10

    @every_kind
    @pytest.mark.parametrize("where", WHERE)
    def test_pruning_equals_masking(self, images: Tensor, relative_error: Any, name: str, where: str) -> None:
        """Compared with the unpatched model with masked tokens in later blocks."""
        model, prefix = build_hf(name), MODELS[name].prefix
        there, gone = list(range(25 + prefix)), []
        for remove in WHERE[where]:
            gone.append([i for i in range(25 + prefix) if i not in there])
            kept = naive.random(torch.zeros(len(there), 1), remove, prefix, 0)[1]
            there = [there[i] for i in kept]
        for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
            model = model.to(dtype)
            with Hide(gone) as hide:
                expected = last_tokens(model, images.to(dtype))[:, there]
            assert hide.call == 4
            with lp.patch(model, "random", WHERE[where]):
                assert relative_error(last_tokens(model, images.to(dtype)), expected.double()) < limit

    @every_kind
    @every_method
    def test_an_image_does_not_depend_on_its_batch(self, draw: Any, name: str, method: str) -> None:
        model, images = build_hf(name), draw(3)
        images[1:] *= torch.tensor([10.0, 0.1]).view(2, 1, 1, 1)
        with lp.patch(model, METHODS[method], WHERE["two"]):
            together = run(model, images)
            for b in range(3):
                torch.testing.assert_close(run(model, images[b : b + 1]), together[b : b + 1], rtol=1e-4, atol=1e-5)

    @every_kind
    @every_method
    def test_bfloat16(self, images: Tensor, relative_error: Any, name: str, method: str) -> None:
        """Approximately, because bfloat16 ranks near-ties differently; the count is exact."""
        model, left = build_hf(name), 19 + MODELS[name].prefix
        with lp.patch(model, METHODS[method], WHERE["one"]):
            full = run(model, images).double()
            with torch.autocast("cpu", torch.bfloat16):
                cast = run(model, images)
                assert last_tokens(model, images).shape[1] == left
        model.bfloat16()
        with lp.patch(model, METHODS[method], WHERE["one"]):
            low = run(model, images.bfloat16())
            assert last_tokens(model, images.bfloat16()).shape[1] == left
        assert low.dtype == torch.bfloat16
        assert relative_error(cast, full) < 0.15
        assert relative_error(low, full) < 0.15

    @pytest.mark.parametrize("name", ["Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel"])
    @every_method
    def test_images_of_other_sizes(self, draw: Any, relative_error: Any, name: str, method: str) -> None:
        model = build_hf(name).double()
        for size in (20, 28, 16):
            images = draw(size=size).double()
            prefix, removed = MODELS[name].prefix, WHERE["one"]
            expected = pruned_by_hand(model, images, removed, looped(method), prefix, blocks_of, parts_of, outputs_of)
            with lp.patch(model, METHODS[method], removed):
                assert relative_error(run(model, images), expected) < 1e-10
