"""Pruned models of transformers: compilation, export, checkpointing, Trainer, and errors."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader

import lightning_prune as lp
from lightning_prune.callbacks import TokenPruning
from lightning_prune.errors import ArgumentError

from .huggingface_models import (
    KINDS,
    METHODS,
    MODELS,
    WHERE,
    blocks_of,
    build_hf,
    every_kind,
    every_method,
    every_model,
    last_tokens,
    outputs_of,
    run,
)


@pytest.mark.long
class TestGraphs:
    @pytest.mark.parametrize(
        ("name", "method", "backend"),
        [
            *((name, "pomt", "eager") for name in KINDS),
            *((name, "pairs", "aot_eager") for name in ("ViTModel", "DINOv3ViTModel")),
        ],
    )
    def test_compile(self, draw: Any, name: str, method: str, backend: str) -> None:
        torch._dynamo.reset()
        model = build_hf(name)
        lp.patch(model, METHODS[method], WHERE["two"])
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for seed in range(2):
            images = draw(seed=seed)
            torch.testing.assert_close(run(compiled, images), run(model, images), rtol=1e-5, atol=1e-5)
        assert counter.frame_count == 1

    @pytest.mark.parametrize(
        ("name", "method"),
        [*((name, "pomt") for name in KINDS), *((name, "pairs") for name in ("ViTModel", "DINOv3ViTModel"))],
    )
    def test_export(self, images: Tensor, name: str, method: str) -> None:
        model = build_hf(name)
        handle = lp.patch(model, METHODS[method], WHERE["two"])
        expected = run(model, images)
        with torch.no_grad():
            program = torch.export.export(model, (images,))
        assert set(program.state_dict) == set(model.state_dict())
        assert torch.equal(run(model, images), expected)
        handle.remove()
        torch.testing.assert_close(run(program.module(), images), expected, rtol=1e-5, atol=1e-5)


class TestFeaturesOfTransformers:
    @every_model
    @pytest.mark.parametrize("patched_first", [True, False])
    def test_hidden_states(self, images: Tensor, name: str, patched_first: bool) -> None:
        model, prefix = build_hf(name), MODELS[name].prefix
        with torch.no_grad():
            if not patched_first:
                assert len(model(images, output_hidden_states=True).hidden_states) == 5
            with lp.patch(model, "pomt", WHERE["two"]):
                states = model(images, output_hidden_states=True).hidden_states
                assert [x.shape[1] - prefix for x in states] == [25, 20, 20, 13, 13]
                assert torch.equal(states[4], last_tokens(model, images))
            states = model(images, output_hidden_states=True).hidden_states
            assert [x.shape[1] - prefix for x in states] == [25] * 5

    @every_kind
    @pytest.mark.parametrize("method", ["pomt", "pairs"])
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing(self, images: Tensor, name: str, method: str, reentrant: bool) -> None:
        """A checkpointed block runs again during backward, after all other blocks."""
        fixed = {"pos_embed_rescale": None} if name.startswith("DINOv3") else {}  # else drawn anew in every pass
        model = build_hf(name, **fixed).train()
        gradients = []
        with lp.patch(model, METHODS[method], WHERE["two"]):
            for checkpointing in (False, True):
                if checkpointing:
                    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                counts: list[int] = []
                part = next(blocks_of(model)[0].children())  # its norm or its attention
                hook = part.register_forward_hook(lambda *_, c=counts: c.append(1))
                model.zero_grad()
                outputs_of(model(images.clone().requires_grad_())).square().sum().backward()
                hook.remove()
                assert len(counts) == 1 + checkpointing
                gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for key, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-5, msg=key)

    def test_interpolated_positions(self, draw: Any) -> None:
        """The numbers of the schedule hold; others are checked in forward."""
        model = build_hf("ViTForImageClassification")
        with lp.patch(model, "pomt", [0, 20, 0, 0]), torch.no_grad():
            states = model(draw(size=28), interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
            assert [x.shape[1] for x in states] == [50, 50, 30, 30, 30]
            message = r"at most 14 of the 17 tokens that enter block 1 with pomt, got 20\."
            with pytest.raises(lp.ScheduleError, match=message):
                model(draw(size=16), interpolate_pos_encoding=True)


class TestErrors:
    @pytest.mark.parametrize(
        "name",
        [
            "Dinov2Backbone",
            "Dinov2WithRegistersBackbone",
            "DINOv3ViTBackbone",
            "ViTForMaskedImageModeling",
            "DeiTForMaskedImageModeling",
        ],
    )
    def test_models_that_reshape_tokens_are_rejected(self, name: str) -> None:
        model = build_hf(name)
        reason = "it reshapes its tokens to their grid after the blocks"
        message = rf"^{name}( at 'inside')? cannot be pruned: {reason}\. Pass `restore='auto'`"
        for outer in (model, nn.ModuleDict({"inside": model})):
            with pytest.raises(lp.UnsupportedModelError, match=message):
                lp.patch(outer, "random", WHERE["one"])

    @every_kind
    @pytest.mark.parametrize("method", ["pomt", "pairs"])
    def test_unfused_attention_is_rejected(self, images: Tensor, name: str, method: str) -> None:
        model = build_hf(name)
        model.set_attn_implementation("eager")
        message = (
            rf"The attention implementation of this {name} must be 'sdpa' to be read, got 'eager'\. "
            r'Call `model\.set_attn_implementation\("sdpa"\)` first\.'
        )
        with pytest.raises(lp.UnsupportedModelError, match=message):
            lp.patch(model, METHODS[method], WHERE["one"])
        model.set_attn_implementation("sdpa")
        with lp.patch(model, METHODS[method], WHERE["one"]):
            expected = run(model, images)
            model.set_attn_implementation("eager")
            with pytest.raises(lp.UnsupportedModelError, match=r"does not call .*scaled_dot_product_attention"):
                run(model, images)
            model.set_attn_implementation("sdpa")
            assert torch.equal(run(model, images), expected)

    @every_kind
    def test_methods_that_read_no_attention_accept_unfused_attention(self, images: Tensor, name: str) -> None:
        model = build_hf(name)
        with lp.patch(model, "random", WHERE["two"]):
            expected = run(model, images)
        model.set_attn_implementation("eager")
        with lp.patch(model, "random", WHERE["two"]):
            torch.testing.assert_close(run(model, images), expected, rtol=1e-4, atol=1e-5)

    @every_kind
    @every_method
    def test_an_attention_mask_is_rejected(self, images: Tensor, name: str, method: str) -> None:
        model, count = build_hf(name), 25 + MODELS[name].prefix
        mask = torch.ones(2, count)
        mask[:, -3:] = 0
        if name.startswith(("DINOv3", "CLIP", "Siglip")):  # which hand it to attention as it comes
            mask = mask[:, None, None].log()
        message = r"`attention_mask` must be None in a model whose blocks remove tokens, got a mask\."
        assert not torch.equal(last_tokens(model, images, attention_mask=mask), last_tokens(model, images))
        with lp.patch(model, METHODS[method], WHERE["one"]), pytest.raises(ArgumentError, match=message):
            model(images, attention_mask=mask)

    def test_an_attention_mask_after_a_reduction_is_rejected(self, images: Tensor) -> None:
        model = build_hf("ViTModel")
        mask = torch.zeros(2, 1, 20, 20)
        blocks_of(model)[2].register_forward_pre_hook(lambda m, args: (args[0], mask))
        with (
            lp.patch(model, "random", WHERE["one"]),
            pytest.raises(ArgumentError, match="`attention_mask` must be None"),
        ):
            model(images)

    def test_layers_of_the_user_are_not_split(self) -> None:
        model = build_hf("ViTModel")
        model.layers = nn.ModuleList(nn.Identity() for _ in range(4))
        with pytest.raises(lp.UnsupportedModelError, match=r"ViTModel contains no list of ViTLayer or DeiTLayer\."):
            lp.patch(model, "random", WHERE["one"])


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = build_hf("ViTForImageClassification")
        self.seen: list[int] = []
        self.encoder.vit.layernorm.register_forward_pre_hook(lambda module, args: self.seen.append(args[0].shape[1]))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        result = self.encoder(**batch)
        self.log("val/loss", result.loss)


def test_in_a_trainer(draw: Any) -> None:
    """With batches as from Hugging Face datasets."""
    module, images = Module(), draw(8)
    data: Any = [{"pixel_values": image, "labels": i % 7} for i, image in enumerate(images)]
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", callbacks=[TokenPruning("pomt", schedule=6, block=1)], **options)
    before = run(module.encoder, images)
    trainer.validate(module, DataLoader(data, batch_size=4), verbose=False)
    assert module.seen[-2:] == [20, 20]
    assert trainer.callback_metrics["pruning/removed"] == 6
    assert torch.equal(run(module.encoder, images), before)


def test_planning(draw: Any) -> None:
    module, images = Module().eval(), draw(16)
    before = run(module.encoder, images)
    profile = lp.profile_latency(module, images[:4], time_limit=1, verbose=False)
    assert profile.tokens[-1] == 26
    plan = lp.plan(module, images[:4], calibration=images, methods="pomt", profile=profile, time_limit=1, verbose=False)
    assert plan.schedule.depth == 4
    assert torch.equal(run(module.encoder, images), before)
