"""Agreement with the dense model, for each kind of output, against plain loops; and the choice of the kind."""

import math
from types import SimpleNamespace

import pytest
import torch
import torchmetrics
from torch import nn

import lightning_prune as lp
from helpers.models import tiny_vit
from lightning_prune.patching import find_vision_transformer
from lightning_prune.profiling.output_kinds import (
    OUTPUT_KINDS,
    choose_proxy,
    feature_similarity,
    proxy_of_targets,
    r2,
    soft_agreement,
    tag_agreement,
)


def pair(seed=1, images=20, outputs=6, dtype=torch.float32):
    return torch.randn(2, images, outputs, generator=torch.Generator().manual_seed(seed)).to(dtype).unbind(0)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def naive_soft_agreement(dense, pruned):
    def probability(row, index):
        exps = [math.exp(x) for x in row]
        return exps[index] / sum(exps)

    tops = [max(range(len(row)), key=row.__getitem__) for row in dense]
    given = sum(probability(row, top) for row, top in zip(pruned, tops, strict=True)) / len(tops)
    own = sum(probability(row, top) for row, top in zip(dense, tops, strict=True)) / len(tops)
    return given / own


def naive_tag_agreement(dense, pruned):
    ratios = []
    for present in (True, False):
        shares = []
        for dense_row, pruned_row in zip(dense, pruned, strict=True):
            for d, p in zip(dense_row, pruned_row, strict=True):
                if (d > 0) == present:
                    given, own = (sigmoid(p), sigmoid(d)) if present else (1 - sigmoid(p), 1 - sigmoid(d))
                    shares.append(min(given / own, 1.0))
        if shares:
            ratios.append(sum(shares) / len(shares))
    return sum(ratios) / len(ratios)


def naive_r2(dense, pruned):
    found = []
    for column in range(len(dense[0])):
        known = [row[column] for row in dense]
        mean = sum(known) / len(known)
        variation = sum((value - mean) ** 2 for value in known)
        error = sum((a[column] - b[column]) ** 2 for a, b in zip(dense, pruned, strict=True))
        if variation > 1e-9:
            found.append(1 - error / variation)
    return max(sum(found) / len(found), 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("agreement", "naive"),
    [(soft_agreement, naive_soft_agreement), (tag_agreement, naive_tag_agreement), (r2, naive_r2)],
)
def test_agreement_is_its_definition(agreement, naive, dtype):
    dense, other = pair(dtype=dtype)
    pruned = dense + 0.3 * other
    assert agreement(dense, pruned) == pytest.approx(naive(dense.tolist(), pruned.tolist()), rel=1e-5)
    assert agreement(dense, dense) == pytest.approx(1.0)


def naive_similarity(dense, pruned):
    common = (
        [sum(column) / len(dense) for column in zip(*dense, strict=True)] if len(dense) > 1 else [0.0] * len(dense[0])
    )
    total = 0.0
    for d, p in zip(dense, pruned, strict=True):
        a, b = ([x - m for x, m in zip(row, common, strict=True)] for row in (d, p))
        total += sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(
            sum(x * x for x in a) * sum(y * y for y in b)
        )
    return total / len(dense)


@pytest.mark.parametrize("images", [1, 20])
def test_feature_similarity_is_its_definition(images):
    dense, other = pair(images=images, outputs=8)
    pruned = dense + 0.3 * other
    assert feature_similarity(dense, pruned) == pytest.approx(
        naive_similarity(dense.tolist(), pruned.tolist()), rel=1e-5
    )
    assert feature_similarity(dense, dense) == 1.0


def test_unrelated_features_are_not_similar_whatever_they_have_in_common():
    dense, other = pair(images=200, outputs=16)
    assert feature_similarity(100 + dense, 100 + other) == pytest.approx(0.0, abs=0.1)


def test_flipped_tags_are_not_made_up_for_by_surer_ones():
    dense = torch.full((10, 10), -2.0)
    dense[:, 0] = 0.1
    pruned = dense.clone()
    pruned[:, 0] = 5.0  # surer than dense
    assert tag_agreement(dense, pruned) == pytest.approx(1.0)
    pruned[:, 1:3] = 2.0  # flipped
    lost = 2 / 9 * (1 - sigmoid(-2) / sigmoid(2)) / 2
    assert tag_agreement(dense, pruned) == pytest.approx(1 - lost)


def test_rare_tags_weigh_as_much_as_absent_ones():
    """One tag of a hundred is present, and lost."""
    dense = torch.full((1, 100), -4.0)
    dense[0, 3] = 4.0
    pruned = torch.full((1, 100), -4.0)
    assert tag_agreement(dense, pruned) == pytest.approx((sigmoid(-4) / sigmoid(4) + 1) / 2)
    assert tag_agreement(-dense.abs(), -dense.abs()) == pytest.approx(1.0)  # no tag is present at all


def test_r2_leaves_out_constant_columns_and_refuses_constant_outputs():
    dense = torch.tensor([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    pruned = dense + torch.tensor([0.5, 9.0])
    assert r2(dense, pruned) == pytest.approx(1 - 0.75 / (14 / 3))
    assert r2(dense, dense + 100) == 0.0
    with pytest.raises(lp.DataError, match="all 3 calibration images the same"):
        r2(torch.ones(3, 2), torch.ones(3, 2))


def naive_divergence(kind, dense, pruned, scale):
    total = 0.0
    for d, p in zip(dense.tolist(), pruned.tolist(), strict=True):
        if kind == "soft_agreement":
            log_p = [x - math.log(sum(map(math.exp, d))) for x in d]
            log_q = [x - math.log(sum(map(math.exp, p))) for x in p]
            total += sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))
        elif kind == "tag_agreement":
            for a, b in zip(map(sigmoid, d), map(sigmoid, p), strict=True):
                total += a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))
        elif kind == "r2":
            total += sum(((a - b) / s) ** 2 for a, b, s in zip(d, p, scale.tolist(), strict=True)) / len(d) / 2
        elif kind == "patch_cosine":  # 1 - cosine of vectors of length 1
            total += (sum(a * a for a in d) + sum(b * b for b in p)) / 2 - sum(a * b for a, b in zip(d, p, strict=True))
        else:
            total += sum((a - b) ** 2 for a, b in zip(d, p, strict=True)) / sum(a * a for a in d) / 2
    return total


@pytest.mark.parametrize("kind", OUTPUT_KINDS)
def test_divergence_is_its_definition(kind):
    dense, pruned = pair(dtype=torch.float64)
    if kind == "patch_cosine":  # its outputs have length 1
        dense, pruned = (torch.nn.functional.normalize(each) for each in (dense, pruned))
    scale = dense.square().mean(0).sqrt()
    expected = naive_divergence(kind, dense, pruned, scale)
    assert OUTPUT_KINDS[kind].divergence(dense, pruned, scale) == pytest.approx(expected, rel=1e-9)
    assert OUTPUT_KINDS[kind].divergence(dense, dense, scale) == pytest.approx(0.0, abs=1e-12)


class Task(nn.Module):
    """A model with a loss and a metric, as a LightningModule has them."""

    def __init__(self, vit, **members):
        super().__init__()
        self.vit = vit
        for name, member in members.items():
            setattr(self, name, member)


@pytest.mark.parametrize(
    ("outputs", "members", "expected"),
    [
        (0, {}, "cosine"),
        (1, {}, "r2"),
        (5, {}, "soft_agreement"),
        (5, {"loss": nn.CrossEntropyLoss()}, "soft_agreement"),
        (5, {"loss": nn.BCEWithLogitsLoss()}, "tag_agreement"),
        (5, {"loss": nn.SmoothL1Loss()}, "r2"),
        (5, {"metric": torchmetrics.classification.MultilabelF1Score(5)}, "tag_agreement"),
        (5, {"metric": torchmetrics.classification.MulticlassAccuracy(5)}, "soft_agreement"),
        (5, {"metric": torchmetrics.MeanSquaredError()}, "r2"),
        (5, {"loss": nn.BCEWithLogitsLoss(), "metric": torchmetrics.MeanSquaredError()}, "soft_agreement"),  # both
        (1, {"loss": nn.BCEWithLogitsLoss()}, "tag_agreement"),
        (1, {"loss": nn.CrossEntropyLoss()}, "r2"),
    ],
)
def test_the_proxy_is_chosen_by_the_outputs_losses_and_metrics(outputs, members, expected):
    model = Task(tiny_vit(num_classes=outputs), **members)
    assert choose_proxy(model, find_vision_transformer(model)) == expected


@pytest.mark.parametrize(
    ("problem", "expected"),
    [("regression", "r2"), ("multi_label_classification", "tag_agreement"), (None, "soft_agreement")],
)
def test_the_configuration_of_hugging_face_decides(problem, expected):
    model = tiny_vit()
    model.config = SimpleNamespace(problem_type=problem)
    assert choose_proxy(model, find_vision_transformer(model)) == expected


@pytest.mark.parametrize(
    ("outputs", "proxy"),
    [(1, "soft_agreement"), (0, "soft_agreement"), (0, "tag_agreement"), (5, "softmax"), (5, None)],
)
def test_a_proxy_that_does_not_fit_is_refused(outputs, proxy):
    model = tiny_vit(num_classes=outputs)
    with pytest.raises(lp.ArgumentError, match=f"`proxy` must be .*got {proxy!r}"):
        choose_proxy(model, find_vision_transformer(model), proxy)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, ""),
        (torch.tensor([1, 2]), "soft_agreement"),
        (torch.tensor([1.0, 2.0]), ""),  # classes or numbers
        (torch.tensor([[0, 1, 0], [1, 0, 0]]), "soft_agreement"),  # one-hot
        (torch.tensor([[0.1, 0.8, 0.1]]), "soft_agreement"),  # smoothed
        (torch.tensor([[0, 1, 1], [0, 0, 0]]), "tag_agreement"),
        (torch.tensor([[0.0, 1.0, 1.0]]), "tag_agreement"),
        (torch.tensor([[0.5, -2.0, 7.0]]), "r2"),
        (torch.rand(2, 3, 8, 8), ""),  # a second view
        (torch.rand(2, 4), ""),  # not one for each output
        (torch.tensor([170.5, 182.25]), "r2"),  # numbers, and the model gives more than one
    ],
)
def test_targets_say_what_the_outputs_are(targets, expected):
    assert proxy_of_targets(targets, 3) == expected
    assert proxy_of_targets(targets, 1) == ""
    plain = tiny_vit(num_classes=3)
    assert choose_proxy(plain, find_vision_transformer(plain), targets=targets) == (expected or "soft_agreement")


def test_losses_count_more_than_targets_which_may_happen_to_look_like_classes():
    """One tag an image in the first batch."""
    model = Task(tiny_vit(num_classes=3), loss=nn.BCEWithLogitsLoss())
    one_tag = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert choose_proxy(model, find_vision_transformer(model), targets=one_tag) == "tag_agreement"
