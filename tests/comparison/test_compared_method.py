"""The variants of one method of a comparison."""

import torch

from helpers.models import tiny_vit
from lightning_prune.comparison.compared_method import ComparedMethod
from lightning_prune.comparison.request_reading import read_methods
from lightning_prune.patching import find_vision_transformer
from lightning_prune.reduction import POMT


def test_the_amounts_of_a_method_that_leaves_some_counts_only() -> None:
    transformer = find_vision_transformer(tiny_vit())
    request = next(each for each in read_methods(["resize"], POMT()) if each.method == "resize")
    method = ComparedMethod(transformer, request, 17, 0.25, (4, 4))
    assert method.unsupported_reason(torch.zeros(1, 3, 32, 32)) is None
    source = method.source()
    assert (source.smallest, source.largest) == (1, 6)
    left = [source.candidate(amount).schedule.tokens(17)[0] for amount in range(1, 7)]
    assert left == [13, 10, 7, 5, 3, 2]
    assert source.amount(source.fastest()) == 6
