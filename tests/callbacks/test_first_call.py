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
from lightning_prune.callbacks.call_watch import CallWatch, call_in_forward
from lightning_prune.callbacks.first_call import read_call
from lightning_prune.callbacks.passed_images import as_passed, channelwise_affine
from lightning_prune.patching import find_vision_transformer

from .tiny import Snapshot, Tiny, brief, trainer

LARGE = DataLoader(TensorDataset(noise_images(8, size=64), torch.zeros(8, dtype=torch.long)), batch_size=4)


class Changing(Tiny):
    """Changes the images in its `forward`."""

    def __init__(self, change: Any, **options: Any) -> None:
        super().__init__(**options)
        self.change = change

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(self.change(images))


class ChangingInStep(Tiny):
    """Changes the images in its step, and not in its `forward`."""

    def __init__(self, change: Any, **options: Any) -> None:
        super().__init__(**options)
        self.change = change

    def step(self, stage: str, batch: Any) -> Tensor:
        return super().step(stage, (self.change(batch[0]), *batch[1:]))


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
    assert decisions == ["given"]


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
    trainer(callback).validate(module, loader(8), verbose=False)
    (passed,) = seen
    expected = torch.cat([batch[0] for batch in loader(8)]) * scale + shift
    assert len(passed) == 8
    assert torch.allclose(passed.sum((1, 2, 3)).sort().values, expected.sum((1, 2, 3)).sort().values, rtol=1e-4)


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
    module = ChangingInStep(lambda images: images.mul_(3).add_(5))
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
def test_the_watch_sees_each_call_once_and_leaves_no_trace(compiled: str) -> None:
    torch._dynamo.reset()
    model: nn.Module = tiny_vit()
    if compiled == "in place":
        model.compile(backend="eager")
    called = torch.compile(model, backend="eager") if compiled == "wrapped" else model
    before = [dict(vars(module)) for module in called.modules()]
    calls: list[Any] = []
    blocks: list[Any] = []
    watch = CallWatch(find_vision_transformer(called), calls.append, blocks.append)
    images = noise_images(2)
    assert torch.equal(called(images), called(images))
    assert len(calls) == 2
    assert not blocks
    watch.end()
    watch.end()
    called(images)
    assert len(calls) == 2
    assert [dict(vars(module)) for module in called.modules()] == before
    torch._dynamo.reset()


def test_the_watch_sees_the_images_and_the_tokens_of_other_methods() -> None:
    model = tiny_vit()
    calls: list[Any] = []
    blocks: list[Any] = []
    watch = CallWatch(find_vision_transformer(model), calls.append, blocks.append)
    images = noise_images(2)
    features = model.forward_features(images)
    with torch.autocast("cpu", torch.bfloat16):
        model.blocks(features[:, :5])
    watch.end()
    model.forward_features(images)
    assert [torch.equal(call.images, images) for call in calls] == [True]
    assert blocks == [(2, TOKENS, "float32"), (2, 5, "bf16-mixed")]


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


class Features(Tiny):
    """Calls the features of the transformer and its head instead of the transformer."""

    def __init__(self, change: Any = None, **options: Any) -> None:
        super().__init__(**options)
        self.change = change or (lambda images: images)

    def forward(self, images: Tensor) -> Tensor:
        return self.vit.forward_head(self.vit.forward_features(self.change(images)))


@pytest.mark.parametrize("schedule", [0.5, "auto"])
@pytest.mark.usefixtures("clockwork")
def test_images_that_reach_only_a_method_of_the_transformer_are_measured(
    schedule: Any, decisions: list[str], recwarn: pytest.WarningsRecorder
) -> None:
    module, callback = Features(half_size, dynamic_img_size=True), brief(schedule=schedule)
    before = Snapshot(module)
    trainer(callback).validate(module, LARGE, verbose=False)
    assert callback.decision.context["image_shape"] == [3, 32, 32]
    assert module.tokens() == {callback.decision.tokens}
    assert len(decisions) == 1
    assert not [each for each in recwarn if "Vision Transformer" in str(each.message)]
    before.assert_unchanged()


class FeaturesInStep(Tiny):
    """The same in its step, where `forward` calls the transformer."""

    def __init__(self, change: Any, **options: Any) -> None:
        super().__init__(**options)
        self.change = change

    def step(self, stage: str, batch: Any) -> Tensor:
        features = self.vit.forward_intermediates(self.change(batch[0]), intermediates_only=False, output_fmt="NLC")[0]
        self.seen_shape = tuple(features.shape)
        return self.vit.forward_head(features)


@pytest.mark.usefixtures("clockwork")
def test_images_of_a_method_in_the_step_that_differ_are_measured_again(decisions: list[str]) -> None:
    module, callback = FeaturesInStep(half_size, dynamic_img_size=True), brief(schedule=0.5)
    with pytest.warns(UserWarning, match=r"images \(4, 3, 32, 32\) instead of \(4, 3, 64, 64\).*`images_from_batch`"):
        trainer(callback).validate(module, LARGE, verbose=False)
    assert decisions == ["given", "given"]
    assert callback.decision.context["image_shape"] == [3, 32, 32]
    assert module.seen_shape[1] == callback.decision.tokens == 9


@pytest.mark.usefixtures("clockwork")
def test_an_autocast_around_a_method_of_the_transformer_is_measured() -> None:
    class Autocasting(FeaturesInStep):
        def step(self, stage: str, batch: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().step(stage, batch)

    module, callback = Autocasting(lambda images: images), brief(schedule=6)
    with pytest.warns(UserWarning, match="precision bf16-mixed instead of float32.*`precision` of the Trainer"):
        trainer(callback).validate(module, loader(8), verbose=False)
    assert callback.decision.context["precision"] == "bf16-mixed"


@pytest.mark.parametrize("masks", ["in the step", "in forward"])
@pytest.mark.usefixtures("clockwork")
def test_other_tokens_in_the_blocks_than_were_measured_are_said(masks: str) -> None:
    """A step that leaves out patches itself: it embeds the images, and runs the blocks on a part of the tokens."""

    class Masked(Tiny):
        def masked(self, images: Tensor) -> Tensor:
            return self.vit.blocks(self.vit._pos_embed(self.vit.patch_embed(images))[:, :9])

        def forward(self, images: Tensor) -> Tensor:
            return self.masked(images) if masks == "in forward" else self.vit(images)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.left = self.masked(batch[0]).shape[1]

    module, callback = Masked(), brief(schedule=6)
    with pytest.warns(UserWarning, match=rf"4 sequences of 9 tokens in float32 in the step, instead of 4 of {TOKENS}"):
        trainer(callback).validate(module, loader(8), verbose=False)
    assert (callback.decision.dense_tokens, module.left) == (TOKENS, 9 - 6)


@pytest.mark.parametrize("method", ["vit", "forward_features"])
@pytest.mark.usefixtures("clockwork")
def test_two_sizes_in_one_step_are_said(method: str, recwarn: pytest.WarningsRecorder) -> None:
    class Twice(Tiny):
        def forward(self, images: Tensor) -> Tensor:
            run = self.vit if method == "vit" else lambda x: self.vit.forward_head(self.vit.forward_features(x))
            return run(images) + run(half_size(images)) + run(half_size(images))

    module, callback = Twice(dynamic_img_size=True), brief(schedule=0.5)
    before = Snapshot(module, (3, 3, 64, 64))
    trainer(callback).validate(module, LARGE, verbose=False)
    texts = [str(each.message) for each in recwarn if "In one step" in str(each.message)]
    assert len(texts) == 1
    assert texts[0].index("(4, 3, 64, 64)") < texts[0].index("(4, 3, 32, 32)")
    assert callback.decision.context["image_shape"] == [3, 64, 64]
    before.assert_unchanged()


@pytest.mark.usefixtures("clockwork")
def test_the_time_limit_is_the_total_of_two_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_prune.callbacks import planned_schedule

    limits: list[float] = []
    plan_many = planned_schedule.plan_many

    def plan(*args: Any, time_limit: float, **kwargs: Any) -> Any:
        limits.append(time_limit)
        return plan_many(*args, time_limit=time_limit, **kwargs)

    monkeypatch.setattr(planned_schedule, "plan_many", plan)
    callback = brief(calibration=8)
    with pytest.warns(UserWarning, match=r"in the 0 s that are left of `time_limit`"):
        trainer(callback).validate(ChangingInStep(lambda images: images * 3 + 5), loader(8), verbose=False)
    assert limits[0] <= 0.01
    assert limits[1] == 0.001  # the shortest there is: the first plan has used all


@pytest.mark.usefixtures("clockwork")
def test_a_later_run_of_such_a_module_waits_for_its_step(
    decisions: list[str], recwarn: pytest.WarningsRecorder
) -> None:
    module, callback = ChangingInStep(half_size, dynamic_img_size=True), brief(schedule=0.5)
    running = trainer(callback)
    for _ in range(3):
        running.validate(module, LARGE, verbose=False)
    assert decisions == ["given", "given"]
    assert len([each for each in recwarn if "measured again" in str(each.message)]) == 1
    assert module.tokens() == {callback.decision.tokens}


@pytest.mark.usefixtures("clockwork")
def test_a_step_that_calls_the_transformer_late_is_compared_with_its_own_batch(
    decisions: list[str], recwarn: pytest.WarningsRecorder
) -> None:
    class Late(Tiny):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx:
                super().validation_step(batch, batch_idx)

    module, callback = Late(), brief(schedule=6)
    trainer(callback).validate(module, loader(12), verbose=False)
    assert decisions == ["given"]
    assert not [each for each in recwarn if "Vision Transformer" in str(each.message)]
    assert module.tokens() == {TOKENS - 6}


def test_forward_is_run_up_to_the_transformer_and_leaves_no_trace() -> None:
    done: list[str] = []

    class Module(Tiny):
        def forward(self, images: Tensor) -> Tensor:
            done.append(f"before, {'training' if self.training else 'evaluation'}")
            try:
                logits = self.vit(images.mul_(2))
            except Exception:
                done.append("handled")
                raise
            done.append("after")
            return logits

    module, images = Module().train(), noise_images(2)
    before, original = [dict(vars(part)) for part in module.vit.modules()], images.clone()
    call = call_in_forward(module, find_vision_transformer(module), images)
    assert call is not None
    assert torch.equal(call.images, 2 * original)
    assert torch.equal(images, original)
    assert done == ["before, evaluation"]
    assert module.training
    assert [dict(vars(part)) for part in module.vit.modules()] == before


@pytest.mark.parametrize("forward", [lambda images, more: images, lambda batch: batch["image"], lambda images: images])
def test_a_forward_that_cannot_be_called_or_does_not_call_the_transformer_says_nothing(forward: Any) -> None:
    module = Tiny()
    module.forward = forward
    assert call_in_forward(module, find_vision_transformer(module), noise_images(2)) is None
