"""vwt-intra against the formula in float64, one patch at a time, and in whole models."""

import pytest
import torch
from torch import Tensor

import lightning_prune as lp
from helpers.models import tiny_vit
from lightning_prune.errors import ScheduleError, UnsupportedModelError
from lightning_prune.reduction import TokenSequence
from lightning_prune.reduction.pixel_variance import VWTIntra, patch_variances, vwt_intra


def naive_variances(image: Tensor, side: int) -> list[float]:
    """The variances of one image (channels, height, width), by loops."""
    channels, height, width = image.shape
    values = image.double().tolist()
    variances = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            pixels = [
                values[c][y][x]
                for c in range(channels)
                for y in range(top, top + side)
                for x in range(left, left + side)
            ]
            mean = sum(pixels) / len(pixels)
            variances.append(sum((p - mean) ** 2 for p in pixels) / len(pixels))
    return variances


def naive(tokens: Tensor, image: Tensor, side: int, remove: int, prefix: int) -> tuple[Tensor, list[int]]:
    """The kept tokens (N - R, C) of one image, and their positions."""
    variances = naive_variances(image, side)
    kept = sorted(sorted(range(len(variances)), key=lambda i: -variances[i])[: len(variances) - remove])
    positions = [*range(prefix), *(prefix + i for i in kept)]
    return tokens[positions], positions


def draw(batch: int, prefix: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, prefix + 15, 6, generator=generator, dtype=torch.float64)
    contrast = torch.rand(batch, 1, 3, 1, 5, 1, generator=generator, dtype=torch.float64)
    pixels = torch.randn(batch, 3, 3, 4, 5, 4, generator=generator, dtype=torch.float64) * contrast
    return tokens.to(dtype), pixels.view(batch, 3, 12, 20).to(dtype)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_remove_matches_the_reference(prefix: int, batch: int) -> None:
    tokens, pixels = draw(batch, prefix, seed=prefix)
    for b in range(batch):
        torch.testing.assert_close(patch_variances(pixels, 15)[b].tolist(), naive_variances(pixels[b], 4))
    assert VWTIntra().max_removed(prefix + 15, prefix) == 14
    for remove in range(1, 15):
        reduced = vwt_intra(tokens, pixels, remove, prefix)
        assert reduced.sizes is None
        for b in range(batch):
            expected, positions = naive(tokens[b], pixels[b], 4, remove, prefix)
            assert reduced.positions[b].tolist() == positions
            assert torch.equal(reduced.tokens[b], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_ranked_in_float32(dtype: torch.dtype) -> None:
    tokens, pixels = draw(3, 1, dtype)
    assert patch_variances(pixels, 15).dtype == torch.float32
    reduced = vwt_intra(tokens, pixels, 6, 1)
    assert reduced.tokens.dtype == dtype
    for b in range(3):
        expected, positions = naive(tokens[b], pixels[b], 4, 6, 1)
        assert reduced.positions[b].tolist() == positions
        assert torch.equal(reduced.tokens[b], expected)


def test_ties_keep_the_first_in_any_batch() -> None:
    """Saturated patches have equal variances, which are not zero if channels are normalised separately."""
    pixels = torch.tensor([-2.117, -2.035, -1.804]).view(1, 3, 1, 1).expand(1, 3, 32, 32).clone()
    others = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = torch.randn(1, 65, 4)
    for batch in (pixels, torch.cat((others[:3], pixels)), torch.cat((pixels, others))):
        place = 3 if len(batch) == 4 else 0
        reduced = vwt_intra(tokens.expand(len(batch), -1, -1), batch, 40, 1)
        assert reduced.positions[place].tolist() == list(range(25))


def test_an_image_does_not_depend_on_its_batch() -> None:
    tokens, pixels = draw(5, 1, torch.float32)
    together = vwt_intra(tokens, pixels, 7, 1)
    for b in range(5):
        alone = vwt_intra(tokens[b : b + 1], pixels[b : b + 1], 7, 1)
        assert torch.equal(alone.positions[0], together.positions[b])
        assert torch.equal(alone.tokens[0], together.tokens[b])


def test_tokens_without_a_grid_are_rejected() -> None:
    with pytest.raises(UnsupportedModelError, match="14 patch tokens do not form a grid"):
        VWTIntra().reduce(TokenSequence(torch.zeros(1, 15, 4), 1, True, pixels=torch.zeros(1, 3, 12, 20)), 3)


@pytest.mark.parametrize(
    "options", [{}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg", "fc_norm": False}]
)
def test_a_patched_model_matches_the_blocks_on_kept_tokens(options: dict[str, object]) -> None:
    model = tiny_vit("vit_tiny_patch16_224", img_size=(24, 32), depth=3, **options)
    torch._dynamo.reset()  # of models of other tests it may have had enough
    prefix = model.num_prefix_tokens
    images = torch.randn(2, 3, 24, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        x = torch.stack([naive(x[b], images[b], 8, 5, prefix)[0] for b in range(2)])
        expected = model.forward_head(model.norm(model.blocks(x)))
        with lp.patch(model, VWTIntra(), lp.Schedule.single(3, 0, 5)):
            torch.testing.assert_close(model(images), expected)
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(images), expected)
            exported = torch.export.export(model, (images,)).module()
            torch.testing.assert_close(exported(images), expected)


@pytest.mark.long
def test_one_compiled_graph_runs_several_image_sizes() -> None:
    compiled = torch.compile(vwt_intra, fullgraph=True, dynamic=True, backend="eager")
    for rows, columns in ((3, 5), (4, 4), (7, 3)):
        tokens, pixels = torch.randn(2, 1 + rows * columns, 6), torch.randn(2, 3, 8 * rows, 8 * columns)
        assert torch.equal(compiled(tokens, pixels, 4, 1).tokens, vwt_intra(tokens, pixels, 4, 1).tokens)


def test_later_blocks_are_rejected() -> None:
    with pytest.raises(ScheduleError, match=r"`schedule` must .* before which vwt-intra acts, got block 1"):
        lp.patch(tiny_vit(depth=3), VWTIntra(), lp.Schedule.single(3, 1, 5))
