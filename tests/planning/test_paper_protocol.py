"""The protocol of the POMT paper: random drop before block 0, labels, the argmax over every count."""

import pytest

import lightning_prune as lp
from helpers.models import tiny_vit

from .known import IMAGES, STRAIGHT, profile


def test_paper_protocol_is_the_papers_computation():
    """Random drop before block 0, top-1 on labels, utility, argmax over every count; the chosen count is deployed."""
    model = tiny_vit()
    labels = model(IMAGES).argmax(-1)
    labels[::5] = (labels[::5] + 1) % 5
    curve = profile({count: STRAIGHT.get(count, 1.2) for count in range(2, 18)}, protocol="paper")
    made = lp.plan(
        model, IMAGES, profile=curve, block=1, protocol="paper", labels=labels, confirm=False, progress=False
    )
    right = {}
    for count in range(2, 18):
        with lp.patch(model, lp.reduction.RandomDrop(site="input"), [17 - count, 0, 0, 0]):
            right[count] = float((model(IMAGES).argmax(-1) == labels).float().mean())
    utility = {
        c: 0.5 * (1 - curve.latency_ms(c) / curve.dense_ms) + 0.5 * right[c] / max(right.values()) for c in right
    }
    assert made.tokens == max(utility, key=lambda c: (utility[c], c))
    assert made.method == "pomt"
    assert made.schedule.reducing == {1: 17 - made.tokens}


def test_paper_protocol_takes_the_argmax_over_every_count():
    """Counts slower than dense set max L as any other; they are not left out."""
    model = tiny_vit()
    labels = model(IMAGES).argmax(-1)
    latency = dict.fromkeys(range(3, 9), 1.0) | dict.fromkeys(range(9, 17), 4.0) | {17: 2.0}
    curve = profile(latency, protocol="paper")
    made = lp.plan(
        model, IMAGES, profile=curve, block=1, protocol="paper", labels=labels, confirm=False, progress=False
    )
    assert set(made.accuracy) == set(range(3, 18))
    utility = {c: 0.5 * (1 - latency[c] / 4.0) + 0.5 * made.accuracy[c] / max(made.accuracy.values()) for c in latency}
    assert made.tokens == max(utility, key=lambda c: (utility[c], c))


def test_paper_protocol_never_chooses_more_than_the_method_can_remove():
    model = tiny_vit()
    measured = lp.profile_latency(model, IMAGES[:1], protocol="paper", time_limit=0.5, verbose=False)
    assert measured.tokens[0] == 17 - lp.reduction.POMT().max_removed(17, 1)


def test_paper_protocol_asks_for_labels_before_it_measures_for_hours():
    with pytest.raises(lp.ArgumentError, match="`labels` are needed by protocol='paper'"):
        lp.plan(tiny_vit(), IMAGES, protocol="paper", example_inputs=None, progress=False)
