"""One model as dense, pruned, in 8 bits and both in turn; dense again to the bit at the end."""

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import lightning_prune as lp
from helpers.data import noise_images
from helpers.models import tiny_vit
from lightning_prune.patching import find_vision_transformer
from lightning_prune.patching.class_swap import is_patched_module
from lightning_prune.profiling import DENSE, Variant, VariantSwitch
from lightning_prune.profiling.model_variants import variant_timer
from lightning_prune.quantization import Int8Weights
from lightning_prune.reduction import POMT, RandomDrop
from lightning_prune.runtimes import parse_runtime

IMAGES = noise_images(2)
FIVE = lp.Schedule.single(3, 1, 5)


def vit() -> VisionTransformer:
    model: VisionTransformer = tiny_vit(depth=3, num_classes=8)
    return model


def expected(variant: Variant) -> torch.Tensor:
    model = vit()
    if variant.weights is not None:
        variant.weights(model).apply()
    if variant.reduction is not None:
        lp.patch(model, variant.reduction, variant.schedule, tail=variant.tail)
    elif variant.schedule is not None:
        lp.patch(model, variant.schedule)
    return model(IMAGES)


VARIANTS = [
    DENSE,
    Variant("pomt", FIVE),
    Variant(weights=Int8Weights),
    Variant(POMT(), FIVE, weights=Int8Weights),
    Variant(RandomDrop(), lp.KeepRates.single(3, 1, 0.5)),
    Variant(None, lp.Schedule([3, 0, 4], ["tome", None, "topk"])),
    Variant(None, lp.Schedule([0, 4, 3], [None, "evit", "pomt"]), Int8Weights),
    DENSE,
    Variant(weights=Int8Weights),
    Variant("pomt", lp.Schedule.single(3, 1, 9)),
    Variant("pomt", FIVE),
    Variant("exact"),
    Variant("exact", weights=Int8Weights),
    Variant("pomt", FIVE, tail=False),
    DENSE,
]


@torch.no_grad()
def test_switching_gives_each_variant_the_outputs_that_it_has_alone() -> None:
    model = vit()
    before = copy.deepcopy(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    switch = VariantSwitch(find_vision_transformer(model))
    for variant in [*VARIANTS, *reversed(VARIANTS)]:
        switch.to(variant)
        assert torch.equal(model(IMAGES), expected(variant)), variant
    switch.to(VARIANTS[3])
    switch.off()
    assert torch.equal(model(IMAGES), vit()(IMAGES))
    assert [id(p) for p in model.parameters()] == parameters
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(map(is_patched_module, model.modules()))


@pytest.mark.long
@torch.no_grad()
def test_a_runtime_with_its_own_quantizer_after_quantized_weights() -> None:
    model = vit()
    switch = VariantSwitch(find_vision_transformer(model))
    runtimes = [parse_runtime(spec) for spec in ("torch", "onnxruntime", "onnxruntime:quantize=dynamic")]
    variants = [Variant(runtime=runtime) for runtime in runtimes]
    try:
        for number in (0, 2, 0, 1):
            switch.to(Variant(weights=Int8Weights, runtime=runtimes[0]))
            switch.to(variants[number])
            assert torch.allclose(model(IMAGES), vit()(IMAGES), atol=0.1 if number == 2 else 1e-4), variants[number]
    finally:
        switch.off()
    assert torch.equal(model(IMAGES), vit()(IMAGES))


def test_off_restores_the_model_after_a_schedule_that_does_not_fit() -> None:
    model = vit()
    switch = VariantSwitch(find_vision_transformer(model))
    with pytest.raises(lp.ScheduleError, match="at most 14"):
        switch.to(Variant("pomt", lp.Schedule.single(3, 1, 17), weights=Int8Weights))
    switch.off()
    assert torch.equal(model(IMAGES), vit()(IMAGES))


def test_a_variant_without_a_method_is_refused() -> None:
    with pytest.raises(lp.ArgumentError, match="`method`"):
        VariantSwitch(find_vision_transformer(vit())).to(Variant(None, FIVE))


def test_compare_latency_takes_variants_and_pairs() -> None:
    model = vit()
    variants = {
        "dense": None,
        "pomt": ("pomt", FIVE),
        "int8": Variant(weights=Int8Weights),
        "both": Variant("pomt", FIVE, Int8Weights),
        "mixed": (None, lp.Schedule([3, 0, 4], ["tome", None, "topk"])),
    }
    timings = lp.compare_latency(model, IMAGES, variants, rounds=2, time_limit=None, verbose=False)
    assert list(timings) == list(variants)
    assert {timing.rounds for timing in timings.values()} == {2}
    assert timings["dense"].ratio == 1
    assert torch.equal(model(IMAGES), vit()(IMAGES))


def interrupted(model: VisionTransformer) -> None:
    with variant_timer(find_vision_transformer(model), IMAGES) as timer:
        timer.prepare(VARIANTS[3])
        raise KeyboardInterrupt


def test_variant_timer_restores_the_model_after_an_error() -> None:
    model = vit()
    with pytest.raises(KeyboardInterrupt):
        interrupted(model)
    assert torch.equal(model(IMAGES), vit()(IMAGES))
