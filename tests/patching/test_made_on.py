"""Schedules that were made elsewhere, and schedules of keep rates, on a patched model."""

import re
import warnings
from typing import Any

import pytest
import torch

import lightning_prune as lp
from lightning_prune._utils.device import device_name
from lightning_prune._utils.measurement_source import MeasurementSource

HERE = device_name(torch.device("cpu"))


def made(**source: Any) -> lp.Schedule:
    return lp.Schedule([0, 6, 0, 0], made_on=MeasurementSource(**source))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"device": "Jetson Orin"}, rf"device Jetson Orin there, {re.escape(HERE)} here\."),
        ({"device": HERE, "batch_size": 16}, r"made elsewhere: batch_size 16 there, 2 here\. It is used unchanged"),
        ({"device": "H200", "batch_size": 1}, r"device H200 there, .* here; batch_size 1 there, 2 here"),
    ],
)
@pytest.mark.parametrize("method", ["pomt", "random"])
def test_other_conditions_warn(build: Any, draw: Any, source: dict[str, Any], words: str, method: str) -> None:
    model = build()
    with lp.patch(model, method, made(**source)):
        with pytest.warns(UserWarning, match=words) as caught:
            pruned = model(draw())
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(model(draw()), pruned), "said once"
    with lp.patch(model, method, [0, 6, 0, 0]):
        assert torch.equal(model(draw()), pruned)


def test_a_schedule_made_here_does_not_warn(build: Any, draw: Any) -> None:
    with (
        warnings.catch_warnings(),
        lp.patch(build(), "pomt", made(device=HERE, batch_size=2, dense_tokens=26)) as handle,
    ):
        warnings.simplefilter("error")
        handle.transformer.root(draw())


def test_the_warning_does_not_break_the_graph(build: Any, draw: Any) -> None:
    model = build()
    torch._dynamo.reset()
    with lp.patch(model, "pomt", made(device="Jetson Orin")), torch.no_grad():
        fast = torch.compile(model, backend="eager", fullgraph=True)
        assert fast(draw()).shape == (2, 7)


def test_a_schedule_for_other_tokens_warns(build: Any, draw: Any, leaving: Any) -> None:
    with (
        lp.patch(build(), "pomt", made(dense_tokens=197)) as handle,
        pytest.warns(UserWarning, match="made elsewhere: dense_tokens 197 there, 26 here"),
    ):
        assert leaving(handle.transformer.root, draw()) == (26, 20, 20, 20)
    dynamic = build("dynamic-size")
    with (
        lp.patch(dynamic, "pomt", made(dense_tokens=26)),
        pytest.warns(UserWarning, match="dense_tokens 26 there, 50 here"),
    ):
        assert leaving(dynamic, draw(size=28)) == (50, 44, 44, 44)


class TestKeepRates:
    @pytest.mark.parametrize("method", ["pomt", "random"])
    def test_keep_rates_are_resolved_for_each_size(self, build: Any, draw: Any, leaving: Any, method: str) -> None:
        rates = lp.KeepRates([1, 0.7, 1, 0.5])
        model = build("dynamic-size")
        with lp.patch(model, method, rates) as handle:
            assert handle.schedule == rates.with_method(method)
            for size, tokens in ((20, 26), (28, 50), (16, 17)):
                assert leaving(model, draw(size=size)) == rates.schedule(tokens).tokens(tokens)
                pruned = model(draw(size=size))
                with lp.patch(build("dynamic-size"), method, rates.schedule(tokens)) as other:
                    assert torch.equal(other.transformer.root(draw(size=size)), pruned)

    def test_prefix_tokens_are_not_counted(self, build: Any, draw: Any, leaving: Any) -> None:
        with lp.patch(build("dinov2-registers"), "pomt", lp.KeepRates([1, 0.7, 1, 1])) as handle:
            assert leaving(handle.transformer.root, draw()) == (30, 23, 23, 23), "18 of 25 patch tokens stay"

    def test_keep_rates_follow_a_changed_image_size(self, build: Any, draw: Any, leaving: Any) -> None:
        model = build()
        with lp.patch(model, "pomt", lp.KeepRates([1, 0.5, 1, 1])) as handle:
            assert leaving(model, draw()) == (26, 14, 14, 14)
            model.set_input_size(img_size=28)
            assert leaving(model, draw(size=28)) == (50, 26, 26, 26)
            handle.update([0, 40, 0, 0])
            assert leaving(model, draw(size=28)) == (50, 10, 10, 10)

    def test_keep_rates_of_a_schedule_fit_other_sizes(self, build: Any, draw: Any, leaving: Any) -> None:
        schedule = lp.Schedule([0, 5, 0, 0], "pomt", MeasurementSource(device=HERE, dense_tokens=26))
        rates = lp.KeepRates.of(schedule, 26)
        assert rates.made_on == MeasurementSource(device=HERE)
        assert leaving(build(img_size=28), draw(size=28)) == (50,) * 4
        with lp.patch(build(img_size=28), "pomt", rates) as handle:
            assert leaving(handle.transformer.root, draw(size=28)) == (50, 41, 41, 41)

    def test_an_update(self, build: Any, draw: Any, leaving: Any) -> None:
        model = build("dynamic-size")
        with lp.patch(model, "random", [0, 6, 0, 0]) as handle:
            handle.update(lp.KeepRates([1, 1, 0.2, 1]))
            assert leaving(model, draw(size=28)) == (50, 50, 11, 11)

    def test_keeping_all(self, build: Any, draw: Any) -> None:
        model = build("dynamic-size")
        before = model(draw())
        with lp.patch(model, "pomt", lp.KeepRates([1, 1, 1, 1])) as handle:
            assert not handle.active
        with lp.patch(model, "pomt", lp.KeepRates([1, 0.99, 1, 1])), torch.no_grad():
            torch.testing.assert_close(model(draw()), before.detach())  # ceil(0.99 * 25) is 25

    def test_errors(self, build: Any, draw: Any) -> None:
        for name in ("vit", "dynamic-size"):
            with pytest.raises(lp.ScheduleError, match="must have 4 blocks, as the model, got 3"):
                lp.patch(build(name), "pomt", lp.KeepRates([1, 0.5, 1]))
        with pytest.raises(lp.ScheduleError, match=r"at most 23 of the .* block 1 .* got 24"):
            lp.patch(build(), "pomt", lp.KeepRates([1, 0.01, 1, 1]))
        with (
            lp.patch(build("dynamic-size"), "pomt", lp.KeepRates([1, 0.01, 1, 1])) as handle,
            pytest.raises(lp.ScheduleError, match=r"at most 47 of the 50 tokens that enter block 1 .* got 48"),
        ):
            handle.transformer.root(draw(size=28))

    @pytest.mark.long
    def test_one_graph_for_all_sizes(self, build: Any, draw: Any) -> None:
        model = build("dynamic-size")
        torch._dynamo.reset()
        with lp.patch(model, "pomt", lp.KeepRates([1, 0.7, 1, 0.5])), torch.no_grad():
            fast = torch.compile(model, backend="eager", fullgraph=True)
            for size in (20, 28, 16):
                torch.testing.assert_close(fast(draw(size=size)), model(draw(size=size)), rtol=1e-5, atol=1e-5)
