"""vwt-inter in models: tokens, independence of the batch, compilation and export."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from helpers.models import tiny_vit
from lightning_prune.errors import ArgumentError, ScheduleError
from lightning_prune.reduction.visual_words import VWTInter, group_by_word, merge_groups
from lightning_prune.reduction.vocabulary import Vocabulary


def vit(kind: str = "vit_tiny_patch16_224", **options: Any) -> Any:
    return tiny_vit(kind, dtype=torch.float64, **{"depth": 3, **options})


def images(batch: int = 4, size: int = 32) -> Tensor:
    """Images with increasingly similar patches."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)
    flat = torch.randn(3, 1, 1, generator=generator, dtype=torch.float64)
    return flat + noise * torch.linspace(1, 0.1, batch).view(-1, 1, 1, 1)


def words(**options: Any) -> Vocabulary:
    return lp.learn_vocabulary([images(8).float()], patch_size=8, words=12, progress=False, **options)


def test_an_image_does_not_depend_on_its_batch() -> None:
    model, batch = vit(), images()
    with torch.no_grad(), lp.patch(model, VWTInter(words(), 0.3)):
        together = model(batch)
        counts = group_by_word(batch, 16, words(), 0.3).counts.tolist()
        assert len(set(counts)) > 1
        for b in range(4):
            torch.testing.assert_close(model(batch[b : b + 1])[0], together[b], rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}])
def test_blocks_receive_the_merged_tokens(options: dict[str, Any]) -> None:
    """A single image has no padding, so its logits are those of the unpatched blocks on the merged tokens."""
    model, batch, vocabulary = vit(**options), images()[2:3], words()
    prefix = model.num_prefix_tokens
    grouping = group_by_word(batch, 16, vocabulary, 0.3)
    count = int(grouping.counts)
    assert 1 < count < 16
    with torch.no_grad():
        x = model.norm_pre(model._pos_embed(model.patch_embed(batch)))
        merged = merge_groups(x, grouping, prefix, count).tokens
        expected = model.forward_head(model.norm(model.blocks(merged)))
        with lp.patch(model, VWTInter(vocabulary, 0.3)):
            torch.testing.assert_close(model(batch), expected)


def test_a_threshold_of_zero_is_the_dense_model() -> None:
    model, batch = vit(), images()
    with torch.no_grad():
        dense = model(batch)
        with lp.patch(model, VWTInter(words(), 0)):
            torch.testing.assert_close(model(batch), dense)
        assert torch.equal(model(batch), dense)


@pytest.mark.long
def test_padding_to_all_patches_compiles_and_exports() -> None:
    torch._dynamo.reset()  # of models of other tests it may have had enough
    model, batch = vit(), images()
    with torch.no_grad():
        with lp.patch(model, VWTInter(words(), 0.3)):
            expected = model(batch)
        with lp.patch(model, VWTInter(words(), 0.3, pad_to="image")):
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            exported = torch.export.export(model, (batch,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
            for run in (model, compiled, exported, copy.deepcopy(model)):
                torch.testing.assert_close(run(batch), expected)
            torch.testing.assert_close(exported(batch[:3]), expected[:3])


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (Vocabulary(torch.randn(3, 48), 4), r"`vocabulary` must be for patches of 8 x 8 .* got one for 4 x 4"),
        (
            Vocabulary(torch.randn(3, 192), 8, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
            r"`vocabulary` must be for .* mean \(0.5, 0.5, 0.5\) .* got one for \(0.485, 0.456, 0.406\)",
        ),
        (
            Vocabulary(torch.randn(3, 192), 8, mean=(0.5, 0.5, 0.5), std=(0.229, 0.224, 0.225)),
            r"`vocabulary` must be for .* std \(0.5, 0.5, 0.5\) .* got one for \(0.229, 0.224, 0.225\)",
        ),
    ],
)
def test_a_vocabulary_for_another_model_is_rejected_when_patching(vocabulary: Vocabulary, message: str) -> None:
    model = vit()
    with pytest.raises(ArgumentError, match=message):
        lp.patch(model, VWTInter(vocabulary))


def test_a_matching_vocabulary_is_accepted() -> None:
    for known in ({}, {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}):
        lp.patch(vit(), VWTInter(words(**known))).remove()


def test_an_unknown_patch_size_is_checked_in_forward() -> None:
    class Embedding(nn.Module):
        def __init__(self, embed: nn.Module) -> None:
            super().__init__()
            self.embed, self.num_patches, self.grid_size = embed, embed.num_patches, embed.grid_size

        def forward(self, x: Tensor) -> Tensor:
            return self.embed(x)

    model = vit()
    model.patch_embed = Embedding(model.patch_embed)
    with (
        lp.patch(model, VWTInter(Vocabulary(torch.randn(3, 48), 4))),
        pytest.raises(ArgumentError, match=r"`vocabulary` must be for patches of 3 x 8 x 8 .* got one for 3 x 4 x 4"),
    ):
        model(images())


def test_a_schedule_is_rejected() -> None:
    with pytest.raises(ScheduleError, match="`schedule` must be left out with vwt-inter"):
        lp.patch(vit(), VWTInter(words()), [1, 0, 0])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_small_patch16_dinov3", {}),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
    ],
)
def test_an_image_does_not_depend_on_its_batch_in_other_models(name: str, options: dict[str, Any]) -> None:
    model = vit(name, **options)
    batch = images()
    with torch.no_grad(), lp.patch(model, VWTInter(words(), 0.3)):
        together = model(batch)
        for b in (0, 3):
            torch.testing.assert_close(model(batch[b : b + 1])[0], together[b], rtol=0, atol=1e-10)
