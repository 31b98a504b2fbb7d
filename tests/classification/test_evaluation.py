import pytest
import torch
from torch import Tensor

from lightning_prune._utils.sampler_shares import SamplerShare
from lightning_prune.classification.evaluation import Evaluation, check_batch, split_batch
from lightning_prune.errors import DataError

LABELS = torch.tensor([0, 2, 5, 1])


def test_valid_batches_pass() -> None:
    check_batch(torch.zeros(4, 6), LABELS, 6, "validation batch 0")
    check_batch(torch.full((4, 6), torch.nan), LABELS, 6, "training batch 0", finite=False)
    for kind in (list, tuple):
        images, labels = split_batch(kind([torch.zeros(4, 1), LABELS]), "validation batch 0")
        assert images.shape == (4, 1)
        assert labels is LABELS


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(4, 5), LABELS, r"^Logits .*\(4, 6\), got shape \(4, 5\)\."),
        ({"logits": 1}, LABELS, r"^Logits .*\(4, 6\), got dict\."),
        (torch.zeros(4, 6), LABELS.float(), r"^Labels .*integers.*got torch.float32 of shape \(4,\)"),
        (
            torch.zeros(4, 6),
            LABELS[:, None],
            r"^Labels .*integers.*got torch.int64 of shape \(4, 1\)",
        ),
        (torch.zeros(4, 6), LABELS + 3, r"^Labels .*0 to 5,.*got 8\."),
        (torch.zeros(4, 6), LABELS - 1, r"^Labels .*0 to 5,.*got -1\."),
        (
            torch.zeros(4, 6).index_fill(0, torch.tensor([1, 3]), torch.inf),
            LABELS,
            r"^Logits .*finite.*2 of 4 images",
        ),
    ],
)
def test_invalid_batches_are_rejected(logits: object, labels: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        check_batch(logits, labels, 6, "test batch 7")
    assert "of test batch 7" in str(error.value)


@pytest.mark.parametrize(
    ("batch", "came"), [(LABELS, "Tensor"), ([LABELS], r"\['Tensor'\]"), ({"image": 1}, "dict"), ((LABELS, 3), "'int'")]
)
def test_a_batch_that_is_not_a_pair_is_rejected(batch: object, came: str) -> None:
    with pytest.raises(DataError, match=rf"^Test batch 7 must be a pair.*got .*{came}"):
        split_batch(batch, "test batch 7")


def test_reset_clears_all_metrics() -> None:
    evaluation = Evaluation(num_classes=6, warmup=0)
    for label in (5, 0):
        evaluation.reset()
        evaluation.timer.start()
        with evaluation.timing(torch.zeros(4, 1)):
            logits = torch.eye(6)[torch.zeros(4, dtype=torch.long)]
        evaluation.update(logits, torch.full((4,), label))
        evaluation.timer.stop()
    found = {name: metric.compute().item() for name, metric in evaluation.finish().items()}
    assert found["top1"] == found["top5"] == 1.0
    assert found["throughput"] > 0
    assert found["throughput_end_to_end"] > 0


def test_finish_counts_the_times_once() -> None:
    evaluation = Evaluation(num_classes=6, warmup=0)
    with evaluation.timing(torch.zeros(4, 1)):
        pass
    first = evaluation.finish()["throughput"]
    assert first.images == 4
    assert evaluation.finish()["throughput"].images == 4


def test_half_precision_logits_are_counted_in_float() -> None:
    evaluation = Evaluation(num_classes=6, warmup=0)
    evaluation.update(torch.eye(6, dtype=torch.bfloat16)[:4], torch.arange(4))
    assert evaluation.finish()["loss"].compute().item() == pytest.approx(1.0435, abs=1e-3)


@pytest.mark.parametrize(
    ("share", "counted"),
    [
        (None, 8),
        (SamplerShare(items=8, distinct=8, batch_size=4), 8),
        (SamplerShare(8, 5, 4), 5),
        (SamplerShare(8, 4, 4), 4),
    ],
)
def test_repeated_images_are_left_out_of_accuracy_and_loss(share: SamplerShare | None, counted: int) -> None:
    """Two batches of four, all classified correctly except for the repeated images."""
    evaluation = Evaluation(num_classes=6, warmup=0)
    evaluation.shares = [None, share]
    classes = torch.arange(8).where(torch.arange(8) < counted, 5) % 4
    right = torch.where(torch.arange(8) < counted, classes, classes + 1)
    for batch_idx, (logits, labels) in enumerate(zip(torch.eye(6)[classes].split(4), right.split(4), strict=True)):
        evaluation.update(logits, labels, batch_idx, dataloader_idx=1)
    metrics = evaluation.finish()
    assert metrics["top1"].compute().item() == 1.0
    assert metrics["loss"].weight.item() == counted
    evaluation.update(torch.eye(6)[[5]], torch.tensor([0]), 0, dataloader_idx=0)  # the other loader repeats nothing
    assert metrics["top1"].compute().item() == pytest.approx(counted / (counted + 1))
