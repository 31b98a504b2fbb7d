"""Precisions: profiled and pruned in the one that the loop runs in, and training in it untouched."""

import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

import lightning_prune as lp
from helpers.data import loader
from helpers.models import TOKENS

from .tiny import Snapshot, Tiny, brief, trainer

pytestmark = pytest.mark.usefixtures("clockwork")


def fp16_mixed() -> dict[str, Any]:
    """Lightning gives a CPU bf16 for "16-mixed"; as a plugin it takes fp16, which torch can by now."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu")]}


PRECISIONS = pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"precision": "32-true"}, "float32"),
        ({"precision": "bf16-mixed"}, "bf16-mixed"),
        ({"precision": "16-mixed"}, "bf16-mixed"),
        ({"precision": "fp16 plugin"}, "16-mixed"),
        ({"precision": "bf16-true"}, "bfloat16"),
        ({"precision": "16-true"}, "float16"),
        ({"precision": "64-true"}, "float64"),
    ],
    ids=lambda value: value["precision"] if isinstance(value, dict) else "",
)


def running(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    if options.get("precision") == "fp16 plugin":
        options = {**options, **fp16_mixed()}
        del options["precision"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*AMP with fp16 is not supported on CPU")
        return trainer(*callbacks, **options)


class Told(Tiny):
    """Remembers in which dtype its attention worked."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        self.vit.blocks[1].attn.proj.register_forward_hook(self._tell)

    def _tell(self, module: torch.nn.Module, args: Any, output: Tensor) -> None:
        if len(output) > 1:  # no batch: the patch tries a block on random tokens of its own
            self.dtypes.add(output.dtype)


def clean() -> bool:
    return torch.get_default_dtype() == torch.float32 and not torch.is_autocast_enabled("cpu")


@PRECISIONS
@pytest.mark.parametrize("schedule", [6, "auto"])
def test_logits_and_measured_precision_are_those_of_the_run(schedule: Any, options: dict[str, Any], told: str) -> None:
    module, callback = Told(), brief(schedule=schedule)
    dense = torch.cat(running(**options).predict(module, loader(8)))
    before = module.state_dict()
    dtypes = set(module.dtypes)
    pruned = torch.cat(running(callback, **options).predict(module, loader(8)))
    again = torch.cat(running(**options).predict(module, loader(8)))
    assert callback.decision.context["precision"] == told
    assert module.dtypes == dtypes
    assert len(dtypes) == 1
    assert callback.decision.schedule.total_removed > 0
    with lp.patch(module, "pomt", callback.decision.schedule):
        expected = torch.cat(running(**options).predict(module, loader(8)))
    assert torch.equal(pruned, expected)
    assert pruned.dtype == dense.dtype
    assert not torch.equal(pruned, dense)
    assert torch.equal(again, dense)
    after = module.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
    assert clean()


def test_16_mixed_on_a_cpu_is_reported_as_bf16_mixed() -> None:
    callback = brief(schedule=6)
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU. Using `precision='bf16-mixed'`"):
        run = trainer(callback, precision="16-mixed")
    run.validate(Tiny(), loader(8), verbose=False)
    assert run.precision == callback.decision.context["precision"] == "bf16-mixed"


@PRECISIONS
def test_fit_trains_as_without_the_callback(options: dict[str, Any], told: str) -> None:
    states = []
    for callbacks in ([brief()], []):
        module = Tiny(drop_rate=0.1)
        L.seed_everything(3)
        running(*callbacks, max_epochs=2, **options).fit(module, loader(8, shuffle=True), loader(8))
        states.append(module.state_dict())
        assert module.tokens("train") == {TOKENS}
        assert (TOKENS in module.tokens("val")) == (not callbacks)
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    if told not in ("bfloat16", "float16"):  # half-precision weights swallow steps as small as these
        assert any(not torch.equal(tensor, Tiny(drop_rate=0.1).state_dict()[n]) for n, tensor in states[1].items())
    assert clean()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true", "64-true"])
def test_an_error_leaves_neither_autocast_nor_a_default_dtype(precision: Any) -> None:
    class Failing(Tiny):
        def _count(self, norm: torch.nn.Module, args: tuple[Tensor]) -> None:
            super()._count(norm, args)
            if self.forwards == 3:
                raise ZeroDivisionError  # while profiling

    module = Failing()
    with pytest.raises(ZeroDivisionError):
        trainer(brief(), precision=precision).validate(module, loader(), verbose=False)
    assert module.steps == []
    assert type(module.vit.blocks[1]).__name__ == "Block"
    assert clean()


class Halved(Tiny):
    """In half precision by the user's own hand: the step casts what the loader gives."""

    def __init__(self, dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.vit.to(dtype)

    def images(self, batch: Any) -> Tensor:
        return batch[0].to(self.vit.cls_token.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("schedule", [6, "auto"])
def test_a_module_converted_to_half_precision_by_the_user_is_pruned(schedule: Any, dtype: torch.dtype) -> None:
    module = Halved(dtype)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    callback = brief(schedule=schedule, images_from_batch=module.images)
    trainer(callback).validate(module, loader(), verbose=False)
    assert callback.decision.context["precision"] == str(dtype).removeprefix("torch.")
    assert module.tokens() == {callback.decision.tokens} != {TOKENS}
    after = module.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )


def test_a_step_that_casts_its_images_is_measured_with_what_it_passes() -> None:
    module, callback = Halved(), brief(schedule=6)
    trainer(callback).validate(module, loader(), verbose=False)
    assert module.tokens() == {TOKENS - 6}
    assert callback.decision.context["precision"] == "float16"


def test_an_autocast_inside_the_step_is_pruned() -> None:
    """The transformer under an autocast of the step's own, in a module of float32."""

    class Autocasting(Told):
        def step(self, stage: str, batch: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().step(stage, batch)

    module = Autocasting()
    before = Snapshot(module)
    callback = brief(schedule=6)
    with pytest.warns(UserWarning, match="precision bf16-mixed instead of float32"):
        trainer(callback).validate(module, loader(), verbose=False)
    assert module.tokens() == {TOKENS - 6}
    assert torch.bfloat16 in module.dtypes
    assert callback.decision.context["precision"] == "bf16-mixed"
    before.assert_unchanged()
