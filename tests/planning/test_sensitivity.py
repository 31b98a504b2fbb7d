"""The KL divergence of one block alone, against whole passes in float64; and how costs follow from it."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import Block, VisionTransformer

import lightning_prune as lp
from helpers.data import noise_images
from helpers.models import tiny_vit
from lightning_prune.classification.digits import ClutteredDigits
from lightning_prune.patching import find_vision_transformer
from lightning_prune.patching.class_swap import is_patched_module
from lightning_prune.planning import sensitivity
from lightning_prune.planning.sensitivity import Sensitivity, SensitivityTuning
from lightning_prune.profiling.output_kinds import class_uncertainty
from lightning_prune.reduction import resolve

IMAGES = noise_images(6)


def vit(kind=VisionTransformer, **kwargs):
    return tiny_vit(kind, noise=0.1, dtype=torch.float64, **kwargs)


def measured(model, method, blocks=range(4), counts=(5, 9, 13, 17), size=4):
    table = Sensitivity(find_vision_transformer(model), resolve(method), list(blocks), list(counts), 17)
    for batch in IMAGES.double().split(size):
        table.add(batch)
    return table


def naive(model, method, block, count):
    """In whole passes, image by image, from the definition."""
    total = 0.0
    with torch.no_grad():
        for image in IMAGES.double():
            dense = model(image[None])[0].softmax(0).tolist()
            with lp.patch(model, method, lp.Schedule.single(4, block, 17 - count)):
                pruned = model(image[None])[0].softmax(0).tolist()
            total += sum(p * np.log(p / q) for p, q in zip(dense, pruned, strict=True))
    return total / len(IMAGES)


class InPlaceBlock(Block):
    """As some implementations write it."""

    def forward(self, x):
        x += self.attn(self.norm1(x))
        x += self.mlp(self.norm2(x))
        return x


def meddling(hook):
    model = vit()
    hook(model)
    return model


MEDDLING = {
    "blocks that work in place": lambda: vit(block_fn=InPlaceBlock),
    "a hook that changes an output": lambda: meddling(
        lambda model: model.blocks[0].register_forward_hook(lambda module, args, output: 1.5 * output + 0.3)
    ),
    "a hook that changes an input": lambda: meddling(
        lambda model: model.blocks[1].register_forward_pre_hook(lambda module, args: (1.5 * args[0],))
    ),
    "a hook that works in place": lambda: meddling(
        lambda model: model.blocks[2].register_forward_hook(lambda module, args, output: output.mul_(1.3))
    ),
}


@pytest.mark.parametrize("made", MEDDLING.values(), ids=MEDDLING)
def test_whatever_blocks_and_hooks_do_to_their_tokens(made):
    model = made()
    table = measured(model, "topk", counts=(5, 11))
    for row, block in enumerate(table.blocks):
        for column, count in enumerate(table.counts[:-1]):
            assert table.table[row, column] == pytest.approx(naive(model, "topk", block, count), abs=1e-12)


@pytest.mark.parametrize("method", ["pomt", "topk", "tome", "pomt-nearest"])
def test_is_the_divergence_of_whole_passes(method):
    model = vit()
    table = measured(model, method)
    assert table.images == 6
    assert table.counts[-1] == 17
    for row, block in enumerate(table.blocks):
        for column, count in enumerate(table.counts[:-1]):
            assert table.table[row, column] == pytest.approx(naive(model, method, block, count), abs=1e-12)
    assert (table.table[:, -1] == 0).all()


def test_works_where_blocks_are_given_more_than_tokens():
    model = vit(Eva, use_rot_pos_emb=True)
    table = measured(model, "topk", counts=(9, 17))
    for row, block in enumerate(table.blocks):
        assert table.table[row, 0] == pytest.approx(naive(model, "topk", block, 9), abs=1e-12)


def test_only_what_the_method_can_remove_is_measured():
    assert measured(vit(), "tome", counts=(3, 9, 13)).counts == [9, 13, 17]


def test_batches_do_not_matter():
    tables = [measured(vit(), "pomt", size=size).table for size in (1, 4, 6)]
    assert np.allclose(tables[0], tables[1], atol=1e-12)
    assert np.allclose(tables[0], tables[2], atol=1e-12)


@pytest.mark.parametrize(("batches", "groups"), [([6], 3), ([2, 4], 3), ([2, 2, 2], 3), ([1, 4, 1], 3)])
def test_images_count_for_their_size_and_each_group_can_be_left_out(monkeypatch, batches, groups):
    """Groups of two images; those beyond three join the groups in turn."""
    monkeypatch.setattr(sensitivity, "TUNING", SensitivityTuning(group_images=2, max_groups=3))
    make = lambda: Sensitivity(find_vision_transformer(vit()), resolve("topk"), range(4), [5, 11], 17)  # noqa: E731
    sizes, alone, table, parts = torch.tensor([0.5, 2.0, 3.5, 1.0, 0.25, 0.75]), [], make(), []
    for image in IMAGES.double():
        single = make()
        single.add(image[None])
        alone.append(single.table)
    for places in torch.arange(6).split(batches):
        table.add(IMAGES[places].double(), sizes=sizes[places])
        parts += [part.tolist() for part in places.split(2)]
    assert np.allclose(table.table, sum(alone) / float(sizes.sum()))
    assert table.images == 6
    assert len(table.without_groups()) == groups
    for group, found in enumerate(table.without_groups()):
        gone = {place for part in parts[group::3] for place in part}
        kept = [place for place in range(6) if place not in gone]
        assert np.allclose(found, sum(alone[place] for place in kept) / float(sizes[kept].sum()))
    assert single.without_groups() == []
    table.take(table.table, 6)
    assert table.without_groups() == []


def test_the_uncertainty_of_a_class_is_the_gini_impurity():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    for row, found in zip(logits.tolist(), class_uncertainty(logits).tolist(), strict=True):
        weights = np.exp(row)
        assert found == pytest.approx(1 - sum((weights / weights.sum()) ** 2))


def test_earlier_blocks_run_once_and_everything_is_restored():
    model, ran = vit(), []
    for index, block in enumerate(model.blocks):
        block.mlp.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    before = [dict(vars(block)) for block in model.blocks]
    measured(model, "topk", blocks=[3], counts=(9, 13), size=6)
    assert ran[:4] == [0, 1, 2, 3]
    assert set(ran[4:]) == {3}  # also when the patch is tried out
    assert [set(vars(block)) for block in model.blocks] == [set(old) for old in before]
    assert not any(map(is_patched_module, model.modules()))


def test_a_forward_that_a_user_has_put_on_a_block_stays():
    model = vit()
    own = model.blocks[0].forward
    wrapped = lambda *args, **kwargs: own(*args, **kwargs)  # noqa: E731
    model.blocks[0].forward = wrapped
    measured(model, "topk", blocks=[2], counts=(9,))
    assert vars(model.blocks[0])["forward"] is wrapped


def test_everything_is_restored_after_an_error():
    model = vit()

    def fail(_, args):
        if args[0].shape[1] < 17:
            raise RuntimeError("out of memory")

    model.blocks[3].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        measured(model, "topk", blocks=[2])
    assert not any(map(is_patched_module, model.modules()))
    assert "forward" not in vars(model.blocks[0])
    assert len(model.blocks[0]._forward_hooks) == 0


def test_outputs_that_are_not_finite_are_refused():
    model = vit()
    model.head.weight.data[0, 0] = float("nan")
    with pytest.raises(lp.DataError, match="outputs are not finite for some of 4 calibration images"):
        measured(model, "topk")


def known(table, counts, blocks=(0, 1)):
    made = Sensitivity(find_vision_transformer(vit()), resolve("topk"), list(blocks), list(counts), 17)
    made._sum, made.images = np.array(table, dtype=float), 1
    return made


def test_costs_from_dense_are_what_a_block_minds():
    table = known([[0.8, 0.2, 0.0], [0.4, 0.1, 0.0]], (5, 11, 17))
    costs = table.costs([5, 11, 17], 3, lambda tokens: tokens - 2)
    assert costs[0, 2].tolist() == pytest.approx([0.8, 0.2, 0.0])
    assert costs[1, 2].tolist() == pytest.approx([0.4, 0.1, 0.0])
    assert costs[2].tolist() == [[0, np.inf, np.inf], [np.inf, 0, np.inf], [np.inf, np.inf, 0]]  # never reduces


def test_costs_of_later_steps_are_between_what_tokens_and_what_shares_say():
    costs = known([[0.8, 0.2, 0.0]], (5, 11, 17), blocks=[0]).costs([5, 11, 17], 1, lambda tokens: tokens - 2)
    by_tokens = 0.8 - 0.2
    same_share = 17 - 17 * 5 / 11  # removed of 17; between 6 and 12, whose divergence is known
    by_share = 0.2 * 4 ** ((same_share - 6) / 6) * 17 / 11
    assert costs[0, 1].tolist() == pytest.approx([np.sqrt(by_tokens * by_share), 0.0, np.inf])


def test_what_the_method_cannot_remove_at_once_is_not_allowed():
    table = known([[0.8, 0.2, 0.0], [0.4, 0.1, 0.0]], (5, 11, 17))
    costs = table.costs([5, 11, 17], 2, lambda tokens: tokens // 2)
    assert costs[0, 2, 0] == np.inf
    assert np.isfinite(costs[0, 2, 1])
    assert costs[0, 1, 0] == np.inf


def test_a_method_that_can_remove_nothing_may_not():
    costs = known([[0.0]], (17,), blocks=[0]).costs([5, 17], 1, lambda tokens: tokens)
    assert costs[0].tolist() == [[0, np.inf], [np.inf, 0]]


def test_between_and_beyond_the_counts_the_cost_is_monotone():
    table = known([[0.8, 0.2, 0.0], [0.1, 0.4, 0.0]], (5, 11, 17))
    levels = list(range(2, 18))
    costs = table.costs(levels, 2, lambda tokens: tokens)
    for block in (0, 1):
        alone = costs[block, -1]
        assert (np.diff(alone) <= 1e-12).all()  # more tokens, less cost
        assert alone[-1] == 0.0
    alone = dict(zip(levels, costs[0, -1], strict=True))
    assert alone[8] == pytest.approx(np.sqrt(0.8 * 0.2))
    assert alone[14] == pytest.approx(0.1)
    assert alone[2] == pytest.approx(0.8 * (15 / 12) ** 2)  # four times for twice the tokens: the square


def test_beyond_the_reach_of_a_method_costs_stay_of_the_order_of_what_was_measured():
    """ToMe merges half of N at once; its last measured steps are steep, and deep levels are far from them."""
    made = Sensitivity(find_vision_transformer(vit()), resolve("tome"), [0], [9, 10], 17)
    made._sum, made.images = np.array([[0.5, 0.05, 0.0]]), 1
    costs = made.costs([3, 5, 9, 17], 1, lambda tokens: (tokens - 1) // 2)
    path = costs[0, 3, 2] + costs[0, 2, 1] + costs[0, 1, 0]
    assert costs[0, 3, 2] == 0.5
    assert 0.5 < path < 4 * 0.5


def test_deep_schedules_of_tome_cost_what_is_predicted_in_order_of_size():
    """On the trained model of the package; schedules that leave half of what one block can."""
    model = lp.ImageClassifier("vit_digits_patch4_56").eval()
    images = torch.stack([image for image, _ in (ClutteredDigits("held_out")[index] for index in range(8))])
    transformer, tome, n = find_vision_transformer(model), resolve("tome"), 197
    table = Sensitivity(transformer, tome, range(4), [99, 115, 140, 170], n)
    table.add(images)
    levels = [45, 60, 70, 90, 110, 130, 150, n]
    costs = table.costs(levels, 12, lambda tokens: tome.max_removed(tokens, 1))
    with torch.no_grad():
        dense = model(images).double().log_softmax(-1)
        for path in ([130, 90, 60, 45], [110, 70, 45, 45], [150, 110, 70, 60]):
            entering = [n, *path]
            removed = [a - b for a, b in pairwise(entering)] + [0] * 8
            with lp.patch(model, "tome", removed):
                pruned = model(images).double().log_softmax(-1)
            measured = float((dense.exp() * (dense - pruned)).sum(-1).mean())
            steps = enumerate(pairwise(levels.index(count) for count in entering))
            predicted = sum(costs[block][step] for block, step in steps)
            assert 1 / 30 < predicted / measured < 30  # an exponential in the tokens is out by powers of ten
