"""vwt-inter against the formula in float64, one image and one patch at a time."""

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_prune.errors import ArgumentError, UnsupportedModelError
from lightning_prune.reduction import TokenSequence
from lightning_prune.reduction import visual_words as vwt_inter
from lightning_prune.reduction.visual_words import VWTInter, nearest_words
from lightning_prune.reduction.vocabulary import Vocabulary

SIDE, ROWS, COLUMNS = 4, 3, 5
PATCHES, VALUES = ROWS * COLUMNS, 3 * SIDE * SIDE


def naive_groups(image: Tensor, words: Tensor, threshold: float) -> list[list[int]]:
    """The patches of each remaining token of an image (channels, height, width), ordered by first patch."""
    groups: list[tuple[int | None, list[int]]] = []
    for row in range(ROWS):
        for column in range(COLUMNS):
            top, left = row * SIDE, column * SIDE
            patch = image[:, top : top + SIDE, left : left + SIDE].double().flatten().tolist()
            distances = []
            for word in words.double().tolist():
                dot = sum(a * b for a, b in zip(patch, word, strict=True))
                length = math.sqrt(sum(a * a for a in patch)) * math.sqrt(sum(b * b for b in word))
                distances.append(1 - (dot / length if length else 0.0))
            near = min(range(len(words)), key=lambda w: distances[w])
            name = near if distances[near] <= threshold else None
            known = next((members for word, members in groups if name is not None and word == name), None)
            if known is None:
                groups.append((name, [row * COLUMNS + column]))
            else:
                known.append(row * COLUMNS + column)
    return [members for _, members in groups]


def draw(batch: int, prefix: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Vocabulary]:
    """Random tokens, a vocabulary, and images whose patches are similar to its words."""
    generator = torch.Generator().manual_seed(prefix)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    words = normal(7, VALUES)
    which = torch.randint(0, 7, (batch, PATCHES), generator=generator)
    noise = torch.rand(batch, PATCHES, 1, generator=generator, dtype=torch.float64)
    patches = (words[which] + 1.5 * noise * normal(batch, PATCHES, VALUES)) * (0.1 + noise)
    grid = patches.view(batch, ROWS, COLUMNS, 3, SIDE, SIDE).permute(0, 3, 1, 4, 2, 5)
    pixels = grid.reshape(batch, 3, ROWS * SIDE, COLUMNS * SIDE)
    return normal(batch, prefix + PATCHES, 6).to(dtype), pixels.to(dtype), Vocabulary(words, SIDE)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("pad_to", ["batch", "image"])
@pytest.mark.parametrize("threshold", [0, 0.15, 0.4, 1.2, 2])
def test_tokens_match_the_formula(prefix: int, batch: int, pad_to: Any, threshold: float) -> None:
    tokens, pixels, vocabulary = draw(batch, prefix)
    method = VWTInter(vocabulary, threshold, pad_to)
    reduced = method.reduce(TokenSequence(tokens, prefix, prefix > 0, pixels=pixels, trace=True), 0)
    groups = [naive_groups(pixels[b], vocabulary.centroids, threshold) for b in range(batch)]
    length = PATCHES if pad_to == "image" else max(map(len, groups))
    assert reduced.tokens.shape == (batch, prefix + length, 6)
    assert reduced.sizes is not None
    assert reduced.sizes.dtype == tokens.dtype
    for b in range(batch):
        padding = length - len(groups[b])
        expected = [tokens[b, prefix + torch.tensor(group)].mean(0) for group in groups[b]]
        torch.testing.assert_close(
            reduced.tokens[b], torch.stack([*tokens[b, :prefix], *expected, *torch.zeros(padding, 6).double()])
        )
        alone = [prefix + group[0] if len(group) == 1 else -1 for group in groups[b]]
        assert reduced.positions[b].tolist() == [*range(prefix), *alone, *[-1] * padding]
        assert reduced.sizes[b].tolist() == [1.0] * (prefix + len(groups[b])) + [0.0] * padding
        went = {i: place for place, group in enumerate(groups[b]) for i in group}
        assert reduced.sources is not None
        assert reduced.sources[b].tolist() == [*range(prefix), *(prefix + went[i] for i in range(PATCHES))]
    merged = sum(PATCHES - len(group) for group in groups)
    assert (merged > 0) is (threshold > 0)
    if 0 < threshold < 1:
        assert any(len(group) == 1 for group in groups[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_lower_precision_matches_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    tokens, pixels, vocabulary = draw(3, 1, dtype)
    reduced = VWTInter(vocabulary, 0.3).reduce(TokenSequence(tokens, 1, True, pixels=pixels), 0)
    assert reduced.sources is None
    assert reduced.tokens.dtype == dtype
    for b in range(3):
        groups = naive_groups(pixels[b], vocabulary.centroids, 0.3)
        for place, group in enumerate(groups):
            rows = tokens[b, 1 + torch.tensor(group)]
            if len(group) == 1:
                assert torch.equal(reduced.tokens[b, 1 + place], rows[0]), "a patch that stays keeps its bits"
            expected = rows.double().mean(0)
            torch.testing.assert_close(reduced.tokens[b, 1 + place].double(), expected, rtol=tolerance, atol=tolerance)


def test_autocast_does_not_round_distances() -> None:
    tokens, pixels, vocabulary = draw(3, 1, torch.float32)
    sequence = TokenSequence(tokens, 1, True, pixels=pixels)
    exact = VWTInter(vocabulary, 0.3).reduce(sequence, 0)
    with torch.autocast("cpu", torch.bfloat16):
        blurred = VWTInter(vocabulary, 0.3).reduce(sequence, 0)
    assert torch.equal(exact.tokens, blurred.tokens)


def test_an_image_does_not_depend_on_its_batch() -> None:
    tokens, pixels, vocabulary = draw(6, 1)
    method = VWTInter(vocabulary, 0.3)
    together = method.reduce(TokenSequence(tokens, 1, True, pixels=pixels), 0)
    counts = set()
    for b in range(6):
        alone = method.reduce(TokenSequence(tokens[b : b + 1], 1, True, pixels=pixels[b : b + 1]), 0)
        count = alone.tokens.shape[1]
        counts.add(count)
        assert torch.equal(alone.tokens[0], together.tokens[b, :count])
        assert torch.equal(alone.positions[0], together.positions[b, :count])
        assert not together.tokens[b, count:].any()
    assert len(counts) > 1


def test_chunks_of_words_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    patches, words = torch.randn(2, 9, 5), torch.nn.functional.normalize(torch.randn(23, 5), dim=1)
    whole = nearest_words(patches, words)
    monkeypatch.setattr(vwt_inter, "_CHUNK", 5)
    parts = nearest_words(patches, words)
    assert torch.equal(whole[1], parts[1])
    torch.testing.assert_close(whole[0], parts[0])


def test_a_patch_of_zeros_is_not_assigned_to_a_word() -> None:
    _, _, vocabulary = draw(1, 0)
    zeros = torch.zeros(1, 3, ROWS * SIDE, COLUMNS * SIDE)
    sequence = TokenSequence(torch.randn(1, PATCHES, 4), 0, False, pixels=zeros)
    assert VWTInter(vocabulary, 0.99).reduce(sequence, 0).tokens.shape == (1, PATCHES, 4)


def test_an_image_of_one_word_gives_one_token() -> None:
    _, _, vocabulary = draw(1, 0)
    patch = vocabulary.centroids[3].view(3, SIDE, SIDE)
    sequence = TokenSequence(
        torch.randn(1, 1 + PATCHES, 4), 1, True, pixels=patch.repeat(1, ROWS, COLUMNS).unsqueeze(0)
    )
    method = VWTInter(vocabulary, 0.01)
    assert method.reduce(sequence, 0).tokens.shape == (1, 2, 4)
    assert method.max_removed(1 + PATCHES, 1) == PATCHES - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, r"`threshold` must be a cosine distance in \[0, 2\], got -0.1"),
        ({"threshold": 2.01}, r"`threshold` must be a cosine distance in \[0, 2\], got 2.01"),
        ({"threshold": math.nan}, r"`threshold` must .* got nan"),
        ({"threshold": "0.1"}, r"`threshold` must .* got '0.1'"),
        ({"threshold": True}, r"`threshold` must .* got True"),
        ({"pad_to": "all"}, "`pad_to` must be 'batch' or 'image', got 'all'"),
        ({"vocabulary": 3}, "`vocabulary` must be a Vocabulary or the path of one, got 3"),
        ({"vocabulary": None}, "`vocabulary` must be a Vocabulary .*, got None"),
    ],
)
def test_invalid_arguments_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        VWTInter(**{"vocabulary": draw(1, 0)[2], **options})


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (
            Vocabulary(torch.randn(5, 3 * 8 * 8), 8),
            "of 3 x 4 x 4 .* got one for 3 x 8 x 8",
        ),
        (Vocabulary(torch.randn(5, 16), 4), r"`vocabulary` must be for patches of 3 x 4 x 4 .* got one for 1 x 4 x 4"),
        (Vocabulary(torch.randn(5, 48), 2), r"`vocabulary` must be for patches of 3 x 4 x 4 .* got one for 12 x 2 x 2"),
    ],
)
def test_a_vocabulary_with_other_patches_is_rejected(vocabulary: Vocabulary, message: str) -> None:
    tokens, pixels, _ = draw(1, 1)
    with pytest.raises(ArgumentError, match=message):
        VWTInter(vocabulary).reduce(TokenSequence(tokens, 1, True, pixels=pixels), 0)


def test_tokens_without_a_grid_are_rejected() -> None:
    tokens, pixels, vocabulary = draw(1, 1)
    with pytest.raises(UnsupportedModelError, match="14 patch tokens do not form a grid"):
        VWTInter(vocabulary).reduce(TokenSequence(tokens[:, 1:], 1, True, pixels=pixels), 0)


def test_equality_copies_repr_and_settings(tmp_path: Path) -> None:
    vocabulary = draw(1, 0)[2]
    method = VWTInter(vocabulary, 0.2)
    path = vocabulary.save(tmp_path / "words.safetensors")
    for same in (
        VWTInter(path, 0.2),
        VWTInter(str(path), 0.2),
        copy.deepcopy(method),
        pickle.loads(pickle.dumps(method)),
    ):
        assert same == method
        assert hash(same) == hash(method)
    for other in (VWTInter(vocabulary, 0.1), VWTInter(vocabulary, 0.2, "image"), VWTInter(draw(1, 1)[2], 0.2)):
        assert other != method
    assert VWTInter(path).settings() == {"vocabulary": str(path), "threshold": 0.1, "pad_to": "batch"}
    assert repr(method) == f"VWTInter(vocabulary='sha256:{vocabulary.digest[:12]}', threshold=0.2, pad_to='batch')"
