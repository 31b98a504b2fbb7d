"""The Visual Word Tokenizer's inter-image method: merges patches of the same visual word (arXiv 2411.15397)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_prune._utils.validation import check, check_between, check_choice
from lightning_prune.errors import ArgumentError, DataError
from lightning_prune.reduction.base import Reduction, ReductionOutput, TokenSequence
from lightning_prune.reduction.functional import is_exported, precise_product
from lightning_prune.reduction.merging import add_rows_
from lightning_prune.reduction.patchify import cut_like
from lightning_prune.reduction.portable import exact_product, first_index, is_portable, joined, one_hot, whole_numbers
from lightning_prune.reduction.vocabulary import Vocabulary

PadTo = Literal["batch", "image"]
_CHUNK = 2048  # number of words that the patches are compared with at a time, which limits memory


class Grouping(NamedTuple):
    """Assignment of the patches of each image to tokens.

    Attributes:
        slots: (B, patches) index of the token that each patch is merged into; tokens are ordered by first patch.
        counts: (B,) number of tokens that are left of each image, without prefix tokens.

    Both are int64, and float32 in the portable form.
    """

    slots: Tensor
    counts: Tensor


def nearest_words(patches: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """The word with the smallest cosine distance, 1 - cos, to each patch.

    A patch of zeros has distance 1 from every word.

    Args:
        patches: (B, M, D), any floating dtype.
        words: (W, D), each of unit length; float32 or float64.

    Returns:
        Distances (B, M) in the dtype of the words, and indices of the words (B, M).
    """
    best = index = None
    units = normalize(patches.to(words.dtype), dim=-1)
    for start in range(0, words.shape[0], _CHUNK):
        # Autocast would round to half precision, which is too coarse for the threshold.
        similarity, nearest = exact_product(units, words[start : start + _CHUNK].T).max(dim=-1)
        if best is None or index is None:
            best, index = similarity, nearest
        else:
            index = torch.where(similarity > best, nearest + start, index)
            best = torch.maximum(similarity, best)
    assert best is not None  # a vocabulary is never empty
    assert index is not None
    return 1 - best, index


def group_by_word(pixels: Tensor, patches: int, vocabulary: Vocabulary, threshold: float) -> Grouping:
    """Groups the patches of each image: patches within `threshold` of the same word form one group.

    Args:
        pixels: (B, channels, height, width), normalised images, as they enter the model.
        patches: Number of square patches into which the model divides each image.
        vocabulary: The words.
        threshold: Largest cosine distance at which a patch is assigned to a word.

    Raises:
        UnsupportedModelError: If that number of patches does not form a grid of the image.
        ArgumentError: If the vocabulary has another patch size or number of channels.
    """
    cells = cut_like(pixels, patches)
    _check_patches(vocabulary, cells.shape[-1], pixels.shape[1])
    words = vocabulary.units(pixels.device)
    distance, word = nearest_words(cells, words.to(torch.promote_types(pixels.dtype, torch.float32)))
    is_word = distance <= threshold
    if is_portable():
        return _group_in_pairs(word, is_word)
    places = torch.arange(patches, device=pixels.device).expand_as(word)
    # The first patch of each word in the image; the extra column is for patches that are not assigned to a word.
    column = torch.where(is_word, word, len(vocabulary))
    table = places.new_full((word.shape[0], len(vocabulary) + 1), patches)
    first = table.scatter_reduce(1, column, places, "amin").gather(1, column)
    first = torch.where(is_word, first, places)
    rank = (first == places).cumsum(dim=1)
    return Grouping(rank.gather(1, first) - 1, rank[:, -1])


def _group_in_pairs(word: Tensor, is_word: Tensor) -> Grouping:
    """The portable form of the grouping, which compares each patch with each other one.

    Args:
        word: (B, patches) the nearest word of each patch.
        is_word: (B, patches) whether it is near enough.
    """
    places = whole_numbers(0, word.shape[1], word)
    label = torch.where(is_word, word.to(torch.float32), -1 - places)  # a patch without a word is a group of its own
    first = first_index(label.unsqueeze(2) == label.unsqueeze(1))
    is_first = first == places
    earlier = is_first.unsqueeze(1) & (places < first.unsqueeze(2))  # [i, j]: group j begins before that of patch i
    return Grouping(earlier.to(torch.float32).sum(dim=2), is_first.to(torch.float32).sum(dim=1))


def merge_groups(
    tokens: Tensor, grouping: Grouping, num_prefix_tokens: int, length: int, trace: bool = False
) -> ReductionOutput:
    """Replaces each group by the mean of its tokens, in the order of the groups' first patches.

    Args:
        tokens: (B, N, C) before block 0.
        grouping: Assignment of the N - P patch tokens.
        num_prefix_tokens: P, the first tokens, which are kept unchanged.
        length: Number of patch tokens to return, at least the largest count; shorter images are padded with zeros.
        trace: Whether to return `sources`.

    Returns:
        P + `length` tokens. Sizes are 1, also for a group of many patches, because the paper does not weight them, and
        0 for padding.
    """
    batch, count, channels = tokens.shape
    slots = grouping.slots
    precise = torch.promote_types(tokens.dtype, torch.float32)
    patches = tokens[:, num_prefix_tokens:].to(precise)
    places = torch.arange(num_prefix_tokens, count, device=tokens.device).expand(batch, -1)
    if is_portable():
        groups = one_hot(slots, length).transpose(1, 2)
        members = groups.sum(dim=2).to(precise)
        means = precise_product(groups.to(precise) / members.clamp(min=1).unsqueeze(2), patches)
        total = (groups * places.unsqueeze(1)).sum(dim=2).to(torch.int64)
    else:
        row = torch.arange(batch, device=tokens.device).unsqueeze(1) * length
        flat = (slots + row).flatten()
        sums = torch.zeros(batch * length, channels, dtype=precise, device=tokens.device)
        add_rows_(sums, flat, patches.flatten(0, 1))
        members = torch.zeros(batch * length, dtype=precise, device=tokens.device)
        members = members.index_add(0, flat, torch.ones_like(flat, dtype=precise))
        means = (sums / members.clamp(min=1).unsqueeze(1)).view(batch, length, channels)
        members = members.view(batch, length)
        total = torch.zeros_like(members, dtype=torch.int64).scatter_add(1, slots, places)
    # A group of one patch keeps its position.
    positions = torch.where(members == 1, total, -1)
    prefix = torch.arange(num_prefix_tokens, device=tokens.device).expand(batch, -1)
    return ReductionOutput(
        joined(tokens[:, :num_prefix_tokens], means.to(tokens.dtype)),
        joined(prefix, positions),
        joined(torch.ones_like(tokens[:, :num_prefix_tokens, 0]), (members > 0).to(tokens.dtype)),
        joined(prefix, slots.to(torch.int64) + num_prefix_tokens) if trace else None,
    )


class VWTInter(Reduction):
    """Merges patches of the same visual word before block 0: the inter-image method of the Visual Word Tokenizer.

    Source: arXiv 2411.15397. Each patch is compared with the words of a vocabulary by the cosine distance of normalised
    pixels. Patches of an image that are within `threshold` of the same word are merged into the mean of their
    embeddings, positions included; all other patches are kept. The number of tokens depends on the image, so there is
    no schedule. Shorter images of a batch are padded and the padding is masked, so that an image does not depend on the
    others in its batch; the method therefore saves most at batch size 1. As in the paper, the attention to a token does
    not depend on how many patches it was merged from. On the command line:

        lightning-prune vocabulary --config my.yaml --words 1000 --output words.safetensors
        lightning-prune validate --config my.yaml --prune.method VWTInter --prune.method.vocabulary words.safetensors

    Args:
        vocabulary: A `Vocabulary` for the model's patch size and normalisation, or the path of one, written by
            `lightning-prune vocabulary`.
        threshold: Largest cosine distance at which a patch is assigned to a word, in [0, 2].
        pad_to: `"batch"` pads to the longest image of the batch. This synchronises with the device once and breaks the
            graph of `torch.compile`. `"image"` pads to the number of patch tokens of the dense model. This saves no
            time, but the shape is static, so the model can be compiled as one graph; it is needed for export.

    Raises:
        ArgumentError: If an argument is invalid.
        FileFormatError: If the file holds no vocabulary.

    Example:
        >>> import timm
        >>> import torch
        >>> import lightning_prune as lp
        >>> from lightning_prune.reduction import VWTInter
        >>> model = timm.create_model("vit_tiny_patch16_224").eval()
        >>> words = lp.learn_vocabulary([torch.rand(2, 3, 224, 224)], patch_size=16, words=20)
        >>> with lp.patch(model, VWTInter(words, threshold=0.1)):
        ...     logits = model(torch.rand(1, 3, 224, 224))
    """

    name: str = "vwt-inter"
    site: Literal["block", "input"] = "input"
    reads: ClassVar[frozenset[str]] = frozenset({"pixels"})
    tracks_sizes: bool = True
    proportional_attention: bool = True
    is_lossless: bool = True
    adaptive: bool = True

    def __init__(
        self, vocabulary: str | Path | Vocabulary | None = None, threshold: float = 0.1, pad_to: PadTo = "batch"
    ) -> None:
        if vocabulary is None:
            raise ArgumentError(
                "`vocabulary` must be a Vocabulary or the path of one for vwt-inter, got None. Create one with "
                "`lightning-prune vocabulary` and pass it as VWTInter('words.safetensors'), or on the command line as "
                "--prune.method VWTInter --prune.method.vocabulary words.safetensors."
            )
        check_between("threshold", threshold, 0, 2, "a cosine distance")
        check_choice("pad_to", pad_to, get_args(PadTo))
        is_vocabulary = isinstance(vocabulary, str | Path | Vocabulary)
        check("vocabulary", vocabulary, "a Vocabulary or the path of one", is_vocabulary)
        self.vocabulary = vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary.load(vocabulary)
        self.threshold = float(threshold)
        self.pad_to = pad_to

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        """See the class; `remove` is 0, because the number of tokens depends on the images."""
        assert sequence.pixels is not None  # provided because of `reads`
        if self.pad_to == "batch" and is_exported():
            raise ArgumentError(
                "`pad_to` must be 'image' to export a model with vwt-inter, got 'batch', with which the number of "
                "tokens depends on the images."
            )
        patches = sequence.tokens.shape[1] - sequence.num_prefix_tokens
        grouping = group_by_word(sequence.pixels, patches, self.vocabulary, self.threshold)
        length = patches if self.pad_to == "image" else int(grouping.counts.max())
        return merge_groups(sequence.tokens, grouping, sequence.num_prefix_tokens, length, sequence.trace)

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        """All patch tokens except one, because all patches of an image may be of the same word."""
        return max(tokens - num_prefix_tokens - 1, 0)

    def unsupported_reason(self, model: nn.Module) -> str | None:
        """Compares patch size, channels and normalisation of the vocabulary with those of the model."""
        words, config = self.vocabulary, getattr(model, "pretrained_cfg", None) or {}
        sides = _patch_sides(model)
        if sides is not None and sides != (words.patch_size,) * 2:
            return _mismatch("patches of", f"{words.patch_size} x {words.patch_size}", " x ".join(map(str, sides)))
        for name in ("mean", "std"):
            own, theirs = getattr(words, name), config.get(name)
            if own is None or theirs is None or len(theirs) != words.channels:  # a config for other channels
                continue
            if max(abs(a - b) for a, b in zip(own, theirs, strict=True)) > 1e-3:
                return _mismatch(f"images normalised with {name}", f"{own}", f"{tuple(theirs)}")
        return None

    def settings(self) -> dict[str, Any]:
        """Plain values. The vocabulary is given by its file, or by the beginning of its digest."""
        words = self.vocabulary
        return {
            "vocabulary": words.source or f"sha256:{words.digest[:12]}",
            "threshold": self.threshold,
            "pad_to": self.pad_to,
        }


def _patch_sides(model: nn.Module) -> tuple[int, ...] | None:
    """Height and width of the model's patches; None if the model has no attribute for them."""
    embed: Any = getattr(model, "patch_embed", None)
    if hasattr(embed, "feat_ratio"):  # timm, including hybrid models with a convolutional stem
        sides = embed.feat_ratio(as_scalar=False)
    else:  # torchvision, Hugging Face
        sides = getattr(model, "patch_size", getattr(getattr(model, "config", None), "patch_size", None))
    return (sides, sides) if isinstance(sides, int) else tuple(sides) if sides is not None else None


def _mismatch(what: str, own: str, theirs: str) -> str:
    return f"`vocabulary` must be for {what} {theirs} with this model, got one for {own}. Learn one for this model."


def _check_patches(vocabulary: Vocabulary, values: int, channels: int) -> None:
    if values == vocabulary.centroids.shape[1] and channels == vocabulary.channels:
        return
    side = int((values // channels) ** 0.5)
    own = f"{vocabulary.channels} x {vocabulary.patch_size} x {vocabulary.patch_size}"
    raise ArgumentError(_mismatch("patches of", own, f"{channels} x {side} x {side}"))


class TokensPerImage(NamedTuple):
    """Number of patch tokens that are left of an image, without prefix tokens.

    Attributes:
        images: Number of images that were measured.
        patches: Patch tokens of the dense model, for the largest image.
        mean: Mean over the images.
        low: The 5th percentile.
        high: The 95th percentile.
    """

    images: int
    patches: int
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return (
            f"{self.mean:.1f} of {self.patches} patch tokens are left per image (5th percentile {self.low:.0f}, 95th "
            f"{self.high:.0f}; {self.images} images)"
        )


def tokens_per_image(batches: Iterable[Tensor], vocabulary: Vocabulary, threshold: float = 0.1) -> TokensPerImage:
    """Counts the patch tokens that `VWTInter(vocabulary, threshold)` would leave of each image.

    Args:
        batches: Normalised images (B, channels, height, width), on any device.
        vocabulary: The visual words.
        threshold: Largest cosine distance at which a patch is assigned to a word.

    Raises:
        DataError: If there are no images.
        ArgumentError: If the vocabulary has another number of channels.

    Example:
        >>> import torch
        >>> import lightning_prune as lp
        >>> from lightning_prune.reduction import tokens_per_image
        >>> images = torch.rand(4, 3, 1, 1).expand(4, 3, 32, 32)  # each of a single colour
        >>> words = lp.learn_vocabulary([images], patch_size=8, words=4)
        >>> print(tokens_per_image([images], words))
        1.0 of 16 patch tokens are left per image (5th percentile 1, 95th 1; 4 images)
    """
    counts, most, side = [], 0, vocabulary.patch_size
    for images in batches:
        patches = (images.shape[2] // side) * (images.shape[3] // side)
        counts.append(group_by_word(images, patches, vocabulary, threshold).counts.double().cpu())
        most = max(most, patches)
    if not counts:
        raise DataError("`batches` must hold at least one image, got none.")
    all_counts = torch.cat(counts)
    low, high = all_counts.quantile(torch.tensor([0.05, 0.95], dtype=all_counts.dtype)).tolist()
    return TokensPerImage(len(all_counts), most, all_counts.mean().item(), low, high)
