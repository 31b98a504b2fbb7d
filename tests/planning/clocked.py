"""A small model and a clock that is known: what planning is tested with."""

from itertools import pairwise

import pytest

import lightning_prune as lp
from helpers.clock import set_few_rounds, set_latency
from helpers.data import noise_images
from helpers.models import tiny_vit
from lightning_prune.patching.class_swap import is_patched_module
from lightning_prune.profiling.model_variants import VariantSwitch

IMAGES = noise_images(24)
DEPTH, N = 4, 17
FEWEST = 1  # tokens that the exact tail leaves


def vit(**kwargs):
    return tiny_vit(noise=0.1, **kwargs)


@pytest.fixture
def clock(monkeypatch):
    """A block takes a millisecond a token, 0.4 of it before the cut; a reducing block half a token's time more.

    What a test adds to the dictionary multiplies the latencies: method or "dense" -> factor.
    """
    current, factors = {}, {}
    real = VariantSwitch.to

    def to(self, variant):
        real(self, variant)
        current["variant"] = variant

    def seconds(alternative):
        if isinstance(alternative, int):  # a curve: all tokens go before block 0
            return 1e-3 * DEPTH * alternative
        variant = current["variant"]
        if variant.schedule is None:
            return 1e-3 * DEPTH * N
        factor = factors.get("mixed" if variant.reduction is None else variant.reduction.name, 1.0)
        factor = factor(variant.schedule) if callable(factor) else factor
        return 1e-3 * milliseconds(variant.schedule, variant.tail is not False) * factor

    monkeypatch.setattr(VariantSwitch, "to", to)
    set_latency(monkeypatch, seconds)
    set_few_rounds(monkeypatch)
    monkeypatch.setattr("lightning_prune.planning.measurements.attention_share", lambda *_: 0.4)
    return factors


def planned(model=None, **kwargs):
    model = model or vit()
    options = {"example_inputs": IMAGES[:2], "calibration": IMAGES, "time_limit": 20, "verbose": False, "tail": False}
    made = lp.plan(model, **{**options, **kwargs})
    assert not any(map(is_patched_module, model.modules()))
    return made


def milliseconds(schedule, tail=False):
    tokens = (N, *schedule.tokens(N))
    if not tail or not schedule.total_removed:
        return sum(0.4 * a + 0.6 * b + (0.5 * a / N if b < a else 0.0) for a, b in pairwise(tokens))
    *before, last = pairwise(tokens)
    before_ms = sum(0.4 * a + 0.6 * b + (0.5 * a / N if b < a else 0.0) for a, b in before)
    return before_ms + 0.4 * last[0] + 0.6 * FEWEST  # the MLP of the last block runs on hardly any token
