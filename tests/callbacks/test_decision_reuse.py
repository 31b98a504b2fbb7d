"""When the decision of an earlier run holds for the next one."""

from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

import lightning_prune as lp
from helpers.data import loader
from lightning_prune._utils.digests import weights_digest

from .tiny import Tiny, pruner, trainer

BUDGET = {"objective": lp.AccuracyBudget(0.01), "method": "random", "calibration": 8}


def tolerant() -> Tiny:
    """Returns the same logits whatever tokens are left."""
    module = Tiny(noise=0.5)
    nn.init.zeros_(module.vit.head.weight)
    with torch.no_grad():
        module.vit.head.bias.copy_(torch.arange(5.0))
    return module


def sensitive(module: Tiny) -> None:
    """Gives the model a head whose logits change with every token."""
    torch.manual_seed(0)
    nn.init.normal_(module.vit.head.weight, std=30.0)


def kept(module: Tiny, decision: Any) -> float:
    """The soft agreement that a schedule keeps, from its definition."""
    images = torch.cat([batch[0] for batch in loader(8)])
    module.eval()
    with torch.no_grad():
        dense = module(images)
        with lp.patch(module, decision.reduction, decision.schedule):
            pruned = module(images)
    top = dense.argmax(1, keepdim=True)
    return float(pruned.softmax(1).gather(1, top).mean() / dense.softmax(1).gather(1, top).mean())


@pytest.mark.usefixtures("clockwork")
def test_other_weights_that_do_not_tolerate_the_schedule_are_planned_anew(decisions: list[str]) -> None:
    module, callback = tolerant(), pruner(**BUDGET)
    running = trainer(callback)
    running.validate(module, loader(8), verbose=False)
    first = callback.decision
    assert first.schedule.total_removed > 0
    sensitive(module)
    assert kept(module, first) < 0.99
    running.validate(module, loader(8), verbose=False)
    assert decisions == ["plan", "plan"]
    assert kept(module, callback.decision) >= 0.99


@pytest.mark.usefixtures("clockwork")
def test_other_weights_that_tolerate_the_schedule_keep_it_and_say_so(decisions: list[str]) -> None:
    module, callback = tolerant(), pruner(**BUDGET)
    running = trainer(callback)
    running.validate(module, loader(8), verbose=False)
    first = callback.decision
    for shift in (1.0, 2.0):
        with torch.no_grad():
            module.vit.head.bias[0] -= shift
        running.validate(module, loader(8), verbose=False)
    assert decisions == ["plan"]
    assert callback.decision.schedule == first.schedule
    assert callback.decision.plan.accuracy == first.plan.accuracy  # what later checks are compared with
    reason = callback.decision.reason
    assert reason.count(f"Here it keeps {kept(module, first):.2%} (95% interval") == 1
    assert reason.count("of the soft agreement, on 8 images") == 1
    assert callback.decision.latency_ms == first.latency_ms


@pytest.mark.usefixtures("clockwork")
def test_other_images_are_checked_as_other_weights_are(decisions: list[str]) -> None:
    module, callback = tolerant(), pruner(**BUDGET)
    running = trainer(callback)
    running.validate(module, loader(8), verbose=False)
    batches = [(images + 1, labels) for images, labels in loader(8)]
    running.validate(module, (batch for batch in batches), verbose=False)
    assert decisions == ["plan"]
    assert "on 4 images" in callback.decision.reason  # a list of batches cannot be sampled


def change_mlp(module: Tiny) -> None:
    class Slow(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp(x)

    module.vit.blocks[0].mlp = Slow(module.vit.blocks[0].mlp)


def change_attention(module: Tiny) -> None:
    for block in module.vit.blocks:
        block.attn.fused_attn = not block.attn.fused_attn


def change_activation(module: Tiny) -> None:
    module.vit.blocks[2].mlp.act = nn.ReLU()


def add_hook(module: Tiny) -> None:
    module.vit.blocks[2].mlp.register_forward_hook(lambda *_: None)


def replace_method(module: Tiny) -> None:
    mlp = module.vit.blocks[2].mlp
    mlp.forward = MethodType(lambda self, x: type(self).forward(self, x), mlp)


def replace_function(module: Tiny) -> None:
    mlp = module.vit.blocks[2].mlp
    mlp.forward = partial(type(mlp).forward, mlp)


@pytest.mark.parametrize(
    "change", [change_mlp, change_attention, change_activation, add_hook, replace_method, replace_function]
)
@pytest.mark.usefixtures("clockwork")
def test_a_model_that_was_changed_in_place_is_measured_again(change: Any, decisions: list[str]) -> None:
    module, callback = Tiny(), pruner(schedule=5)
    running = trainer(callback)
    running.validate(module, loader(8), verbose=False)
    change(module)
    for _ in range(2):
        running.validate(module, loader(8), verbose=False)
    assert decisions == ["given", "given"]


@pytest.mark.usefixtures("clockwork")
def test_weights_do_not_matter_to_a_given_schedule(decisions: list[str]) -> None:
    module, callback = Tiny(), pruner(schedule=5)
    running = trainer(callback)
    running.validate(module, loader(8), verbose=False)
    sensitive(module)
    running.validate(module, loader(8), verbose=False)
    assert decisions == ["given"]


@pytest.mark.parametrize("change", [lambda weight: weight[0, 0].add_(1e-6), lambda weight: weight.transpose_(0, 1)])
def test_the_digest_of_weights_changes_with_every_bit(change: Any) -> None:
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.load_state_dict(one.state_dict())
    assert weights_digest(one) == weights_digest(other)
    with torch.no_grad():
        change(other.weight)
    assert weights_digest(one) != weights_digest(other)


def test_the_digest_of_sparse_weights_is_that_of_their_layout_and_values() -> None:
    one, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    sparse = one.weight.detach().to_sparse_csr()
    other.weight = nn.Parameter(sparse, requires_grad=False)
    assert weights_digest(other) != weights_digest(one)
    assert weights_digest(other) == weights_digest(other)


class Numbers(Tiny):
    """Five numbers; the batches of `predict` hold no targets that would say so."""


@pytest.mark.usefixtures("clockwork")
def test_a_run_whose_targets_are_of_another_kind_is_planned_anew(decisions: list[str]) -> None:
    module, callback = Numbers(noise=0.5), pruner(**{**BUDGET, "objective": lp.AccuracyBudget(0.9)})
    running = trainer(callback)
    images = [batch[0] for batch in loader(8)]
    numbers = [(each, torch.randn(len(each), 5)) for each in images]
    running.validate(module, (batch for batch in numbers), verbose=False)
    assert callback.decision.plan.proxy == "R2"
    classes = [(each + 1, torch.zeros(len(each), dtype=torch.long)) for each in images]
    running.validate(module, (batch for batch in classes), verbose=False)
    assert callback.decision.plan.proxy == "soft agreement"
    assert decisions == ["plan", "plan"]


@pytest.mark.usefixtures("clockwork")
def test_an_adaptive_method_is_measured_again_on_other_images() -> None:
    from lightning_prune.reduction import VWTInter
    from lightning_prune.reduction.vocabulary import Vocabulary

    module, callback = Tiny(), pruner(method=VWTInter(Vocabulary(torch.randn(3, 192), 8)))
    running = trainer(callback)
    running.validate(module, loader(8), verbose=False)
    first = callback.decision
    running.validate(module, loader(8), verbose=False)
    assert callback.decision is first
    running.validate(module, (batch for batch in [(images + 1, labels) for images, labels in loader(8)]), verbose=False)
    assert callback.decision is not first


@pytest.mark.usefixtures("clockwork")
def test_outputs_that_are_not_finite_do_not_end_training() -> None:
    class Diverging(Tiny):
        def on_validation_start(self) -> None:
            if self.trainer.current_epoch == 1:
                with torch.no_grad():
                    self.vit.head.weight.fill_(float("nan"))

    module, callback = Diverging(noise=0.5), pruner(**BUDGET)
    running = trainer(callback, max_epochs=3, num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="accuracy cannot be estimated here|no schedule can be decided"):
        running.fit(module, loader(4), loader(8))
    assert running.current_epoch == 3


@pytest.mark.usefixtures("clockwork")
def test_a_later_validation_of_fit_plans_on_the_known_profile_within_a_quarter_of_the_limit(
    decisions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_prune.callbacks import planned_schedule

    class Learning(Tiny):
        def on_validation_start(self) -> None:
            if self.trainer.current_epoch == 1:
                sensitive(self)

    module, callback = Learning(noise=0.5), pruner(**BUDGET, use_cache=False)
    module.load_state_dict(tolerant().state_dict())
    asked: list[dict[str, Any]] = []
    plan_many = planned_schedule.plan_many

    def plan(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs)
        return plan_many(*args, **kwargs)

    monkeypatch.setattr(planned_schedule, "plan_many", plan)
    running = trainer(callback, max_epochs=2, num_sanity_val_steps=0, limit_train_batches=1)
    running.fit(module, loader(4), loader(8))
    first, later = asked
    assert decisions == ["plan"]  # one latency profile
    assert later["profile"] is first["profile"]
    assert 0.25 < first["time_limit"] <= 1.0
    assert later["time_limit"] <= 0.25
    assert callback.decision.reused
