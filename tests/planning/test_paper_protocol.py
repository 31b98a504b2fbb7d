"""The protocol of the POMT paper: random drop before block 0, labels, the argmax over every count."""

import pytest

import lightning_prune as lp
from helpers.models import tiny_vit
from lightning_prune.reduction import POMT, RandomDrop

from .clocked import IMAGES, N
from .test_api import STRAIGHT, known_profile


def paper_plan(model, latency, labels, objective=None, batch_size=2):
    context = {"batch_size": batch_size}
    profile = known_profile(latency, protocol="paper", method="random", block=0, context=context)
    options = {"calibration": IMAGES, "methods": "pomt", "blocks": 1, "objective": objective or lp.Utility()}
    return lp.plan(
        model, IMAGES[:2], profile=profile, protocol="paper", labels=labels, time_limit=5, verbose=False, **options
    )


def test_paper_protocol_is_the_papers_computation():
    """Random drop before block 0, top-1 on labels, utility, argmax over every count; the chosen count is deployed."""
    model = tiny_vit()
    labels = model(IMAGES).argmax(-1)
    labels[::5] = (labels[::5] + 1) % 5
    latency = STRAIGHT
    made = paper_plan(model, latency, labels)
    right = {}
    for count in STRAIGHT:
        with lp.patch(model, RandomDrop(site="input"), [N - count, 0, 0, 0]):
            right[count] = float((model(IMAGES).argmax(-1) == labels).float().mean())
    utility = {c: 0.5 * (1 - latency[c] / latency[N]) + 0.5 * right[c] / max(right.values()) for c in right}
    chosen = max(utility, key=lambda c: (utility[c], c))
    assert {N - c.schedule.total_removed: c.accuracy for c in made.front} == pytest.approx(
        {count: value / right[N] for count, value in right.items()}
    )
    assert made.method == "pomt"
    assert made.dense is not None
    if made.total_removed:  # the deployed schedule may be slower than dense here
        assert made.schedule.reducing == {1: N - chosen}
    else:
        assert "nothing is gained" in made.reason


def test_paper_protocol_takes_the_argmax_over_every_count():
    """Counts slower than dense set max L as any other; they are not left out."""
    model = tiny_vit()
    labels = model(IMAGES).argmax(-1)
    latency = dict.fromkeys(range(3, 9), 1.0) | dict.fromkeys(range(9, 17), 4.0) | {N: 2.0}
    made = paper_plan(model, latency, labels, lp.Utility(0.9))
    accuracy = {N - c.schedule.total_removed: c.accuracy for c in made.front}
    assert set(accuracy) == set(range(3, 18))
    utility = {c: 0.9 * (1 - latency[c] / 4.0) + 0.1 * accuracy[c] / max(accuracy.values()) for c in latency}
    chosen = max(utility, key=lambda c: (utility[c], c))
    assert f"schedule that leaves {chosen} tokens" in made.reason or made.tokens == chosen


def test_paper_protocol_warns_where_a_given_profile_does_not_hold():
    model = tiny_vit()
    labels = model(IMAGES).argmax(-1)
    hours = {count: 3.6e6 * latency for count, latency in STRAIGHT.items()}
    with pytest.warns(UserWarning, match="the dense model takes .* ms by the profile, .* ms now"):
        paper_plan(model, hours, labels)
    with pytest.warns(UserWarning, match="batch_size 8 there, 2 here"):
        paper_plan(model, STRAIGHT, labels, batch_size=8)


def test_paper_protocol_never_chooses_more_than_the_method_can_remove():
    measured = lp.profile_latency(
        tiny_vit(), IMAGES[:1], method="pomt", protocol="paper", time_limit=0.5, verbose=False
    )
    assert measured.tokens[0] == N - POMT().max_removed(N, 1)


@pytest.mark.parametrize("methods", [["pomt", "tome"], "auto"])
@pytest.mark.parametrize("blocks", ["all", 1])
def test_paper_protocol_is_of_one_method_in_one_block(methods, blocks):
    labels = tiny_vit()(IMAGES).argmax(-1)
    with pytest.raises(lp.ArgumentError, match="`methods` and `blocks` must be one method and one block"):
        lp.plan(
            tiny_vit(), IMAGES[:2], calibration=IMAGES, methods=methods, blocks=blocks, protocol="paper", labels=labels
        )
