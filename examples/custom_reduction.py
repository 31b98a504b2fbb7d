"""A reduction of your own: it keeps the patch tokens with the largest norm and drops the others.

    python examples/custom_reduction.py

Your package can register it by name for `lp.patch`, `TokenPruning` and `lightning-prune --prune.method norm` with two
lines in its pyproject.toml, where `my_package.reductions` is the module that defines the class:

    [project.entry-points."lightning_prune.reductions"]
    norm = "my_package.reductions:Norm"
"""

import timm
import torch

import lightning_prune as lp
from lightning_prune.reduction import Reduction, ReductionOutput, TokenSequence
from lightning_prune.reduction.functional import keep_best


class Norm(Reduction):
    name = "norm"  # that of the entry point

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        scores = sequence.tokens[:, sequence.num_prefix_tokens :].norm(dim=-1)
        return keep_best(sequence.tokens, scores, remove, sequence.num_prefix_tokens)

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        return max(tokens - num_prefix_tokens - 1, 0)


def main() -> None:
    model = timm.create_model("vit_tiny_patch16_224").eval()
    images = torch.randn(2, 3, 224, 224)
    schedule = lp.Schedule.single(depth=12, block=3, remove=56)
    with torch.no_grad(), lp.patch(model, Norm(), schedule) as handle:
        print(f"{handle.reduction!r}: logits {tuple(model(images).shape)}, tokens {schedule.tokens(197)}")


if __name__ == "__main__":
    main()
