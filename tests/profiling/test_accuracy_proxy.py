import math

import pytest
import torch

import lightning_prune as lp
from helpers.data import noise_images
from helpers.models import tiny_vit
from lightning_prune.profiling import Proxy
from lightning_prune.profiling.accuracy_proxy import top1

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
    assert proxy.measure() == pytest.approx(1.0)


def test_proxy_runs_the_model_as_it_is_patched():
    model = tiny_vit()
    proxy = Proxy(lp.patching.find_vision_transformer(model), IMAGES, CPU, 3)
    dense = model(IMAGES)
    with lp.patch(model, "pomt", [0, 10, 0, 0]):
        assert proxy.measure() == pytest.approx(naive_soft_agreement(dense.tolist(), model(IMAGES).tolist()), rel=1e-4)
        assert proxy.measure() != 1.0


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
    assert proxy.measure() == pytest.approx(1.0)
