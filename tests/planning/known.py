"""A small model, profiles and proxies that are known: what planning in one block is tested with."""

import numpy as np

import lightning_prune as lp
from helpers.data import noise_images
from helpers.models import tiny_vit
from lightning_prune.patching.class_swap import is_patched_module
from lightning_prune.planning import ProxyCurve

IMAGES = noise_images(24)


def profile(latency, protocol="deployed", spread=0.001, **kwargs):
    """A profile of the model above from {tokens: milliseconds}, as if it had been measured."""
    tokens = tuple(sorted(latency))
    values = {
        "tokens": tokens,
        "milliseconds": tuple(latency[count] for count in tokens),
        "spread": spread if isinstance(spread, tuple) else (spread,) * len(tokens),
        "rounds": (9,) * len(tokens),
        "method": "random" if protocol == "paper" else "pomt",
        "block": 0 if protocol == "paper" else 1,
        "depth": 4,
        "protocol": protocol,
        "context": {"batch_size": 2},
    }
    return lp.LatencyProfile(**{**values, **kwargs})


STRAIGHT = {count: 1.0 + 0.1 * count for count in range(3, 18)}


class KnownCurve(ProxyCurve):
    """A proxy whose values are given; records what was asked."""

    def __init__(self, curve, accuracy):
        self.profile, self.values, self.name = curve, {curve.dense_tokens: 1.0}, "soft agreement"
        self.accuracy, self.asked = accuracy, []

    def __call__(self, tokens):
        if tokens not in self.values:
            self.asked.append(tokens)
            self.values[tokens] = self.accuracy(tokens)
        return self.values[tokens]


def planned(latency, accuracy, objective, **kwargs):
    curve = profile(latency)
    known = KnownCurve(curve, accuracy)
    model = tiny_vit()
    made = lp.plan(
        model, IMAGES, profile=curve, curve=known, block=1, objective=objective, confirm=False, progress=False, **kwargs
    )
    assert not any(map(is_patched_module, model.modules()))
    return made, known


def scores(latency, accuracy, objective):
    counts = sorted(latency)
    values = objective.score(np.array([latency[c] for c in counts]), np.array([accuracy(c) for c in counts]))
    return dict(zip(counts, values, strict=True))


def score(tokens, latency, accuracy, objective):
    return scores(latency, accuracy, objective)[tokens]


def best(latency, accuracy, objective):
    return max(scores(latency, accuracy, objective).values())


ACCURACIES = {
    "concave": lambda count: 1 - (1 - count / 17) ** 2,
    "steep": lambda count: 1 / (1 + np.exp(-(count - 9.0))) / (1 / (1 + np.exp(-8.0))),
    "linear": lambda count: 0.5 + 0.5 * count / 17,
}
