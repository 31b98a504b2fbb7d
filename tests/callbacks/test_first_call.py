"""What the step passes to the transformer is what is measured."""

from typing import Any

import pytest
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp
from helpers.data import loader, noise_images
from helpers.models import TOKENS, tiny_hugging_face_vit, tiny_vit
from lightning_prune.callbacks.batches import Calibration
from lightning_prune.callbacks.first_call import as_passed, channelwise_affine, read_call, watch_first_call
from lightning_prune.patching import find_vision_transformer

from .tiny import Snapshot, Tiny, brief, trainer

LARGE = DataLoader(TensorDataset(noise_images(8, size=64), torch.zeros(8, dtype=torch.long)), batch_size=4)


class Changing(Tiny):
    """Changes the images in its step."""

    def __init__(self, change: Any, **options: Any) -> None:
        super().__init__(**options)
        self.change = change

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(self.change(images))


def half_size(images: Tensor) -> Tensor:
    return nn.functional.interpolate(images, 32)


@pytest.mark.parametrize("any_size", [True, False], ids=["a ViT of any size", "a ViT of one size"])
@pytest.mark.parametrize("schedule", [0.5, "auto"])
@pytest.mark.usefixtures("clockwork")
def test_a_step_that_resizes_is_measured_at_the_size_that_it_passes(any_size: bool, schedule: Any) -> None:
    module, callback = Changing(half_size, dynamic_img_size=any_size), brief(schedule=schedule)
    before, running = Snapshot(module), trainer(callback)
    running.validate(module, LARGE, verbose=False)
    decision = callback.decision
    assert decision.dense_tokens == TOKENS
    assert decision.context["image_shape"] == [3, 32, 32]
    assert module.tokens() == {decision.tokens}
    assert running.callback_metrics["pruning/tokens"] == decision.tokens
    if schedule == "auto":
        assert "as the step passed it" in decision.calibration
    before.assert_unchanged()


@pytest.mark.usefixtures("clockwork")
def test_the_next_run_does_not_decide_again(decisions: list[str]) -> None:
    module, callback = Changing(half_size, dynamic_img_size=True), brief(schedule=0.5)
    running = trainer(callback)
    for _ in range(3):
        running.validate(module, LARGE, verbose=False)
    assert decisions == ["given", "given"]  # for the images of the batch, and for what was passed


@pytest.mark.usefixtures("clockwork")
def test_a_normalisation_in_the_step_is_applied_to_the_calibration_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    from lightning_prune.callbacks import planned_schedule

    plan_many = planned_schedule.plan_many

    def plan(*args: Any, calibration: Tensor, **kwargs: Any) -> Any:
        seen.append(calibration)
        return plan_many(*args, calibration=calibration, **kwargs)

    monkeypatch.setattr(planned_schedule, "plan_many", plan)
    scale, shift = torch.tensor([2.0, 3.0, 0.5]).view(1, 3, 1, 1), torch.tensor([1.0, 0.0, -7.0]).view(1, 3, 1, 1)
    module, callback = Changing(lambda images: images * scale + shift), brief(calibration=8)
    with pytest.warns(UserWarning, match="images that the step changed"):
        trainer(callback).validate(module, loader(8), verbose=False)
    raw, passed = seen
    assert len(passed) == 8
    assert torch.allclose(passed, raw * scale + shift, atol=1e-4)


@pytest.mark.usefixtures("clockwork")
def test_a_change_in_place_is_noticed_and_given_calibration_images_are_used_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lightning_prune.callbacks import planned_schedule

    seen: list[Tensor] = []
    plan_many = planned_schedule.plan_many

    def plan(*args: Any, calibration: Tensor, **kwargs: Any) -> Any:
        seen.append(calibration)
        return plan_many(*args, calibration=calibration, **kwargs)

    monkeypatch.setattr(planned_schedule, "plan_many", plan)
    given = noise_images(8, seed=5)
    module = Changing(lambda images: images.mul_(3).add_(5))
    with pytest.warns(UserWarning, match="images that the step changed"):
        trainer(brief(calibration=given)).validate(module, loader(8), verbose=False)
    assert len(seen) == 2
    assert torch.equal(seen[1].sort(0).values, given.sort(0).values)


@pytest.mark.usefixtures("clockwork")
def test_a_compiled_module_around_the_transformer_is_said(recwarn: pytest.WarningsRecorder) -> None:
    class Around(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Identity(), self.vit)
            self.net.compile(backend="eager")

        def forward(self, images: Tensor) -> Tensor:
            return self.net(images)

    torch._dynamo.reset()
    trainer(brief(schedule=6, module_path="vit")).validate(Around(), loader(8), verbose=False)
    assert any("around the Vision Transformer, is compiled" in str(each.message) for each in recwarn)
    torch._dynamo.reset()


@pytest.mark.usefixtures("clockwork")
def test_a_decision_that_is_used_needs_no_images_in_the_batch() -> None:
    callback = brief(schedule=6)
    trainer(callback).validate(Tiny(), loader(8), verbose=False)
    again, module = brief(), Tiny()
    again.use(callback.decision)
    trainer(again).validate(module, ({"x": batch[0]} for batch in loader(8)), verbose=False)
    assert module.tokens() == {TOKENS - 6}


class Interpolating(Tiny):
    """A Hugging Face model that receives images of another size, and a further argument."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny_hugging_face_vit("ViTForImageClassification")
        self.seen: list[int] = []
        blocks = find_vision_transformer(self.vit).blocks
        blocks[-1].register_forward_hook(lambda *args: self.seen.append(_tokens(args[2])))

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(pixel_values=images, interpolate_pos_encoding=True).logits

    def step(self, stage: str, batch: Any) -> Tensor:
        return self(batch[0])


def _tokens(output: Any) -> int:
    return (output if isinstance(output, Tensor) else output[0]).shape[1]


@pytest.mark.parametrize("schedule", [0.5, "auto"])
@pytest.mark.usefixtures("clockwork")
def test_keyword_arguments_of_the_step_are_passed_while_measuring(schedule: Any) -> None:
    module, callback = Interpolating(), brief(schedule=schedule)
    trainer(callback).validate(module, LARGE, verbose=False)
    assert callback.decision.context["image_shape"] == [3, 64, 64]
    assert set(module.seen) == {callback.decision.tokens}


@pytest.mark.usefixtures("clockwork")
def test_what_cannot_be_repeated_is_a_warning() -> None:
    """A tensor that belongs to this batch goes with the images."""

    class Masked(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.vit = WithBias(self.vit)

        def forward(self, images: Tensor) -> Tensor:
            return self.vit(images, bias=torch.zeros(len(images), 1))

    class WithBias(VisionTransformer):
        def __new__(cls, vit: nn.Module) -> Any:
            vit.__class__ = cls
            return vit

        def __init__(self, vit: nn.Module) -> None:
            pass

        def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
            return super().forward(x) if bias is None else super().forward(x) + bias

    module, callback = Masked(), brief(schedule=6)
    with pytest.warns(UserWarning, match="the arguments bias in addition to the images.*`images_from_batch`"):
        trainer(callback).validate(module, loader(8), verbose=False)
    assert module.tokens() == {TOKENS - 6}


def test_a_step_that_passes_the_images_of_the_batch_is_measured_once(decisions: list[str]) -> None:
    trainer(brief(schedule=6)).validate(Tiny(), loader(8), verbose=False)
    assert decisions == ["given"]


def test_a_call_is_read_by_position_and_by_name() -> None:
    model = tiny_hugging_face_vit("ViTForImageClassification")
    images = noise_images(2)
    by_position = read_call(model, (images,), {"labels": torch.tensor([0, 1]), "output_hidden_states": True})
    by_name = read_call(model, (), {"interpolate_pos_encoding": True, "pixel_values": images})
    assert by_position is not None
    assert by_name is not None
    assert torch.equal(by_position.images, images)
    assert (dict(by_position.keywords), by_position.is_repeatable) == ({}, True)
    assert dict(by_name.keywords) == {"interpolate_pos_encoding": True}
    assert read_call(model, (), {"labels": torch.tensor([0])}) is None


@pytest.mark.parametrize("compiled", ["no", "in place", "wrapped"])
def test_the_watch_ends_with_the_first_call_and_leaves_no_trace(compiled: str) -> None:
    torch._dynamo.reset()
    model: nn.Module = tiny_vit()
    if compiled == "in place":
        model.compile(backend="eager")
    called = torch.compile(model, backend="eager") if compiled == "wrapped" else model
    before = dict(vars(called))
    calls: list[Any] = []
    end = watch_first_call(find_vision_transformer(called), calls.append)
    images = noise_images(2)
    assert torch.equal(called(images), called(images))
    assert len(calls) == 1
    assert vars(called) == before
    end()
    watch_first_call(find_vision_transformer(called), calls.append)()
    called(images)
    assert len(calls) == 1
    assert vars(called) == before
    torch._dynamo.reset()


def test_an_affine_change_of_channels_is_found_and_no_other() -> None:
    images = noise_images(4)
    scale, shift = torch.tensor([2.0, -3.0, 0.5]).view(1, 3, 1, 1), torch.tensor([1.0, 0.0, -7.0]).view(1, 3, 1, 1)
    found = channelwise_affine(images, images * scale + shift)
    assert found is not None
    assert torch.allclose(found[0], scale, atol=1e-4)
    assert torch.allclose(found[1], shift, atol=1e-4)
    assert channelwise_affine(images, images.flip(-1)) is None
    assert channelwise_affine(images, images.square()) is None
    assert channelwise_affine(torch.zeros_like(images), torch.zeros_like(images)) is not None


def test_calibration_images_are_those_of_the_first_batch_where_the_change_is_not_known() -> None:
    images, more = noise_images(4), noise_images(8)
    sampled = Calibration(more, torch.arange(8), "sampled", torch.arange(4))
    flipped = as_passed(sampled, images, images.flip(-1))
    assert torch.equal(flipped.images, images.flip(-1))
    assert (flipped.labels, torch.equal(flipped.targets, torch.arange(4))) == (None, True)
    assert isinstance(lp.TokenPruning().config.calibration, int)
