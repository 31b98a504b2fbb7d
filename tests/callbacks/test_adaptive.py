"""TokenPruning with a method whose number of removed tokens depends on the images, in real Trainers."""

from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader

import lightning_prune as lp
from lightning_prune.callbacks import TokenPruning
from lightning_prune.callbacks.decision_panel import panel_of
from lightning_prune.errors import ArgumentError
from lightning_prune.reduction.visual_words import VWTInter
from lightning_prune.reduction.vocabulary import Vocabulary

from .tiny import Tiny, trainer


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(8, 3, 1, 1, generator=generator)
    return flat + torch.linspace(0.1, 1, 8).view(8, 1, 1, 1) * torch.randn(8, 3, 32, 32, generator=generator)


def words() -> Vocabulary:
    return lp.learn_vocabulary([images()], patch_size=8, words=12, progress=False)


def pruner(**options: Any) -> TokenPruning:
    return TokenPruning(VWTInter(words(), 0.3), time_limit=0.3, verbose=False, **options)


def data() -> DataLoader[Any]:
    return DataLoader(torch.utils.data.TensorDataset(images(), torch.zeros(8).long()), batch_size=4)


def test_an_adaptive_method_prunes_each_batch_by_its_images() -> None:
    callback, module = pruner(), Tiny()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    running = trainer(callback)
    running.validate(module, data(), verbose=False)
    decision = callback.decision
    assert decision is not None
    assert decision.adaptive
    assert decision.prunes
    assert (decision.method, decision.dense_tokens) == ("vwt-inter", 17)
    assert decision.tokens < 17
    assert f"the longest of this batch keeps {decision.tokens} of 17 tokens" in decision.reason
    assert module.steps[0].tokens == decision.tokens
    assert len({step.tokens for step in module.steps}) > 1, "each batch has its own length"
    figures = running.callback_metrics
    assert figures["pruning/removed"] == 17 - decision.tokens
    assert figures["pruning/speedup"] == pytest.approx(decision.speedup)
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert not [m for m in module.modules() if "_prune_patch" in vars(m)]


def test_the_panel_of_an_adaptive_method() -> None:
    callback = pruner()
    trainer(callback).validate(Tiny(), data(), verbose=False)
    assert callback.decision is not None
    console = Console(width=120, file=StringIO())
    console.print(panel_of(callback.decision))
    text = console.file.getvalue()
    assert "depends on the image (vwt-inter)" in text
    assert "pruned" in text


def test_use_takes_an_adaptive_decision() -> None:
    callback = pruner()
    trainer(callback).validate(Tiny(), data(), verbose=False)
    first = callback.decision
    assert first is not None
    other, module = pruner(), Tiny()
    other.use(first)
    trainer(other).validate(module, data(), verbose=False)
    assert other.decision is first
    assert max(step.tokens for step in module.steps) < 17


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"schedule": 3}, "`schedule` must be left out with vwt-inter, .* got 3"),
        ({"schedule": [1, 0, 0, 0]}, "`schedule` must be left out with vwt-inter, .* got Schedule"),
        ({"objective": lp.AccuracyBudget(0.1)}, "`objective` must be left out with vwt-inter, .* got AccuracyBudget"),
        ({"protocol": "paper"}, "`protocol` must be left out with vwt-inter, .* got 'paper'"),
    ],
)
def test_settings_without_effect_on_an_adaptive_method_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        pruner(**options)


def test_block_auto_with_an_adaptive_method_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"`block` must be left out with vwt-inter, .* got 'auto'"):
        pruner(block="auto")


def test_a_vocabulary_for_another_patch_size_is_refused_before_the_first_step() -> None:
    callback = TokenPruning(VWTInter(Vocabulary(torch.randn(3, 48), 4)), time_limit=0.3, verbose=False)
    module = Tiny()
    with pytest.raises(ArgumentError, match=r"8 x 8.* got one for 4 x 4"):
        trainer(callback).validate(module, data(), verbose=False)
    assert not module.steps


def test_plan_and_profile_latency_refuse_an_adaptive_method() -> None:
    vit = Tiny().vit.eval()
    method = VWTInter(words())
    for call in (
        lambda: lp.profile_latency(vit, images(), method=method, time_limit=1),
        lambda: lp.plan(vit, images(), calibration=images(), methods=method, time_limit=1),
    ):
        with pytest.raises(ArgumentError, match=r"`method` must be .* got vwt-inter"):
            call()
