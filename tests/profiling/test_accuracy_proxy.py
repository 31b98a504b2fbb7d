import math

import pytest
import torch

import lightning_prune as lp
from helpers.data import noise_images
from helpers.models import tiny_vit
from lightning_prune.profiling import Estimate, Proxy
from lightning_prune.profiling.accuracy_proxy import jackknife, relative_accuracy, top1
from lightning_prune.profiling.output_kinds import feature_similarity, r2, soft_agreement

CPU = torch.device("cpu")


IMAGES = noise_images(7)


def naive_soft_agreement(dense, pruned):
    """From the definition, in Python floats."""

    def probability(row, index):
        exps = [math.exp(x) for x in row]
        return exps[index] / sum(exps)

    tops = [max(range(len(row)), key=row.__getitem__) for row in dense]
    given = sum(probability(row, top) for row, top in zip(pruned, tops, strict=True)) / len(tops)
    own = sum(probability(row, top) for row, top in zip(dense, tops, strict=True)) / len(tops)
    return given / own


def test_top1_counts():
    assert top1(torch.tensor([0, 1, 1]), torch.eye(3)) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("classes", "labels", "name"),
    [
        (5, None, "soft agreement"),
        (1, None, "R2"),
        (0, None, "cosine similarity of features"),
        (5, "dense", "top-1 accuracy relative to dense"),
    ],
)
def test_proxy_chooses_by_what_there_is(classes, labels, name):
    model = tiny_vit(num_classes=classes)
    known = model(IMAGES).argmax(-1) if labels else None
    proxy = Proxy(lp.patching.find_vision_transformer(model), IMAGES, CPU, 3, known)
    assert proxy.name == name
    assert proxy.measure().value == pytest.approx(1.0)


def test_proxy_runs_the_model_as_it_is_patched():
    model = tiny_vit()
    proxy = Proxy(lp.patching.find_vision_transformer(model), IMAGES, CPU, 3)
    dense = model(IMAGES)
    with lp.patch(model, "pomt", [0, 10, 0, 0]):
        assert proxy.measure().value == pytest.approx(
            naive_soft_agreement(dense.tolist(), model(IMAGES).tolist()), rel=1e-4
        )
        assert proxy.measure().value != 1.0


@pytest.mark.parametrize(("label", "message"), [(5, "Label 5 is out of range.*5 classes"), (-1, "Label -1 is out of")])
def test_labels_out_of_range(label, message):
    labels = torch.zeros(7, dtype=torch.int64)
    labels[3] = label
    with pytest.raises(lp.DataError, match=message):
        Proxy(lp.patching.find_vision_transformer(tiny_vit()), IMAGES, CPU, 3, labels)


def test_labels_of_another_number():
    with pytest.raises(lp.ArgumentError, match="`labels` must be one for each of 7 images, got 2"):
        Proxy(lp.patching.find_vision_transformer(tiny_vit()), IMAGES, CPU, 3, torch.zeros(2, dtype=torch.int64))


def test_labels_that_the_model_never_gets_right():
    model = tiny_vit()
    wrong = (model(IMAGES).argmax(-1) + 1) % 5
    with pytest.raises(lp.DataError, match="no labelled image correctly"):
        Proxy(lp.patching.find_vision_transformer(model), IMAGES, CPU, 3, wrong)


def test_outputs_that_are_not_finite():
    model = tiny_vit()
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(lp.DataError, match="not finite for 7 of 7 calibration images"):
        Proxy(lp.patching.find_vision_transformer(model), IMAGES, CPU, 3)


def test_no_images():
    with pytest.raises(lp.ArgumentError, match="`images` must be"):
        Proxy(lp.patching.find_vision_transformer(tiny_vit()), IMAGES[:0], CPU, 3)


@pytest.mark.parametrize("classes", [0, 5])
def test_a_vector_for_each_token_is_no_output_to_compare(classes):
    model = tiny_vit(num_classes=classes, global_pool="")
    with pytest.raises(lp.UnsupportedModelError, match=r"one vector per image, got outputs of shape \(7, 17, "):
        Proxy(lp.patching.find_vision_transformer(model), IMAGES, CPU, 3)


def test_labels_for_a_model_without_logits():
    with pytest.raises(lp.ArgumentError, match="`labels` must be None for a model that returns features"):
        Proxy(lp.patching.find_vision_transformer(tiny_vit(num_classes=0)), IMAGES, CPU, 3, torch.zeros(7).long())


def test_images_come_in_the_precision_of_the_model():
    proxy = Proxy(lp.patching.find_vision_transformer(tiny_vit().bfloat16()), IMAGES, CPU, 3)
    assert proxy.measure().value == pytest.approx(1.0)


def test_standard_error_of_a_mean_is_the_textbooks():
    """Delete-a-group over groups of one image is the ordinary jackknife, which is exact for a mean."""
    values = torch.randn(20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    estimate = jackknife(lambda dense, pruned: float((pruned - dense).mean()), torch.zeros_like(values), values)
    assert estimate.value == pytest.approx(float(values.mean()))
    assert estimate.stderr == pytest.approx(float(values.std() / 20**0.5))


@pytest.mark.parametrize("agreement", [soft_agreement, r2, feature_similarity])
def test_standard_error_is_the_spread_over_samples_of_images(agreement):
    """400 images at a time, 60 times: the spread of the values is what each of them says that it is."""
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(60):
        dense = 2 * torch.randn(400, 10, generator=generator)
        estimates.append(jackknife(agreement, dense, dense + torch.randn(400, 10, generator=generator)))
    values = torch.tensor([estimate.value for estimate in estimates], dtype=torch.float64)
    said = torch.tensor([estimate.stderr for estimate in estimates], dtype=torch.float64)
    assert float(said.mean()) == pytest.approx(float(values.std()), rel=0.3)


def test_standard_error_of_relative_accuracy_is_paired():
    """What both models get wrong is no noise of the change between them."""
    dense = torch.rand(1000, generator=torch.Generator().manual_seed(1)) < 0.5
    assert jackknife(relative_accuracy, dense, dense) == (1.0, 0.0)
    pruned = dense.clone()
    pruned[dense.nonzero()[:10]] = False
    estimate = jackknife(relative_accuracy, dense, pruned)
    assert estimate.value == 1 - 10 / int(dense.sum())
    assert 0 < estimate.stderr < 0.02


def test_one_image_says_nothing_about_the_spread():
    estimate = jackknife(soft_agreement, torch.eye(3)[:1], torch.eye(3)[:1])
    assert estimate == (1.0, math.inf)
    assert estimate.interval is None


def test_interval_holds_95_percent_of_a_normal_distribution():
    low, high = Estimate(0.98, 0.01).interval
    assert (low, high) == (pytest.approx(0.98 - 0.0196), pytest.approx(0.98 + 0.0196))
