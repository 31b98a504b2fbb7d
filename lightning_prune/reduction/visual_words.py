"""The Visual Word Tokenizer, intra-image and inter-image (arXiv 2411.15397)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_prune.errors import ArgumentError, DataError
from lightning_prune.reduction.base import Reduction, ReductionOutput, TokenSequence
from lightning_prune.reduction.functional import add_rows_, take_tokens, with_prefix
from lightning_prune.reduction.patchify import cut_like
from lightning_prune.reduction.vocabulary import Vocabulary


def patch_variances(pixels: Tensor, patches: int) -> Tensor:
    """The variance of each patch over all its pixels and channels.

    Args:
        pixels: (B, channels, height, width), the images as the model sees them: normalised.
        patches: How many square patches the model cuts each into.

    Returns:
        (B, patches), float32 (float64 where the pixels are).

    Raises:
        UnsupportedModelError: If that number of patches does not form a grid of the image.
    """
    precise = torch.promote_types(pixels.dtype, torch.float32)
    return cut_like(pixels, patches).to(precise).var(dim=-1, correction=0)


def vwt_intra(tokens: Tensor, pixels: Tensor, remove: int, num_prefix_tokens: int) -> ReductionOutput:
    """Keeps the N - P - R patch tokens whose patches vary most, in their order; of equals the first.

    Args:
        tokens: (B, N, C) before block 0, prefix tokens first, patch tokens row by row.
        pixels: (B, channels, height, width), the images that they were made of.
        remove: R.
        num_prefix_tokens: P, kept as they are.

    Returns:
        N - R tokens.

    Raises:
        UnsupportedModelError: If the patch tokens are no grid of the image.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction import vwt_intra
        >>> images = torch.zeros(1, 3, 32, 32)
        >>> images[:, :, 20:, 20:] = torch.randn(3, 12, 12)  # only the last patch has anything to see
        >>> vwt_intra(torch.randn(1, 5, 8), images, remove=3, num_prefix_tokens=1).positions
        tensor([[0, 4]])
    """
    count = tokens.shape[1]
    keep = count - num_prefix_tokens - remove
    variances = patch_variances(pixels, count - num_prefix_tokens)
    # Stable, since equals are common here (saturated sky) and `topk` may choose among them by the shape of the batch.
    ranked = variances.sort(dim=-1, descending=True, stable=True).indices
    index = with_prefix(ranked[:, :keep].sort(dim=-1).values, num_prefix_tokens)
    return ReductionOutput(take_tokens(tokens, index), index)


class VWTIntra(Reduction):
    """Visual Word Tokenizer's intra-image reduction: before block 0, patches of little contrast go.

    It needs neither attention nor training, and costs a pass over the pixels. Source: arXiv 2411.15397, where a fixed
    share of the patches, those of the smallest pixel variance, is dropped before the encoder.

    Example:
        >>> import timm
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224").eval()
        >>> handle = lp.patch(model, "vwt-intra", lp.Schedule.single(depth=12, block=0, remove=56))
    """

    name: str = "vwt-intra"
    site: Literal["block", "input"] = "input"
    reads: ClassVar[frozenset[str]] = frozenset({"pixels"})

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        """See `vwt_intra`."""
        assert sequence.pixels is not None  # the patch provides what `reads` asks for
        return vwt_intra(sequence.tokens, sequence.pixels, remove, sequence.num_prefix_tokens)

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        """All patch tokens but one."""
        return max(tokens - num_prefix_tokens - 1, 0)


PadTo = Literal["batch", "image"]
_CHUNK = 2048  # words that all patches are compared with at a time, which bounds the memory


class Grouping(NamedTuple):
    """Which patches of an image become one token.

    Attributes:
        slots: (B, patches) index of the token that each goes into, in the order of the tokens' first patches.
        counts: (B,) tokens that each image is left with, prefix tokens apart.
    """

    slots: Tensor
    counts: Tensor


def nearest_words(patches: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest word of every patch by cosine distance, 1 - cos.

    A patch without length (all zeros) is at distance 1 from every word.

    Args:
        patches: (B, M, D), any floating dtype.
        words: (W, D), each of length one; at least float32.

    Returns:
        Distances (B, M) in the dtype of the words, and indices of the words (B, M).
    """
    best = index = None
    with torch.autocast(patches.device.type, enabled=False):  # in half precision, 0.1 would not be 0.1
        units = normalize(patches.to(words.dtype), dim=-1)
        for start in range(0, words.shape[0], _CHUNK):
            similarity, near = (units @ words[start : start + _CHUNK].T).max(dim=-1)
            if best is None or index is None:
                best, index = similarity, near
            else:
                index = torch.where(similarity > best, near + start, index)
                best = torch.maximum(similarity, best)
    assert best is not None  # a vocabulary has words
    assert index is not None
    return 1 - best, index


def group_by_word(pixels: Tensor, patches: int, vocabulary: Vocabulary, threshold: float) -> Grouping:
    """Groups the patches of every image by itself: those of the same word, near enough to it, are one group.

    Args:
        pixels: (B, channels, height, width), the images as the model sees them: normalised.
        patches: How many square patches the model cuts each into.
        vocabulary: The words.
        threshold: Largest cosine distance at which a patch is a word.

    Raises:
        UnsupportedModelError: If that number of patches does not form a grid of the image.
        ArgumentError: If the vocabulary is of another patch size or channel count.
    """
    cells = cut_like(pixels, patches)
    _check_patches(vocabulary, cells.shape[-1], pixels.shape[1])
    words = vocabulary.units(pixels.device)
    distance, word = nearest_words(cells, words.to(torch.promote_types(pixels.dtype, torch.float32)))
    is_word = distance <= threshold
    places = torch.arange(patches, device=pixels.device).expand_as(word)
    # The first patch of every word in the image; the extra column takes the patches that are no word.
    column = torch.where(is_word, word, len(vocabulary))
    table = places.new_full((word.shape[0], len(vocabulary) + 1), patches)
    first = table.scatter_reduce(1, column, places, "amin").gather(1, column)
    first = torch.where(is_word, first, places)
    rank = (first == places).cumsum(dim=1)
    return Grouping(rank.gather(1, first) - 1, rank[:, -1])


def merge_groups(
    tokens: Tensor, grouping: Grouping, num_prefix_tokens: int, length: int, trace: bool = False
) -> ReductionOutput:
    """The mean of each group's tokens, in the order of their first patches, after the prefix tokens.

    Args:
        tokens: (B, N, C) before block 0.
        grouping: Of the N - P patch tokens.
        num_prefix_tokens: P, kept as they are.
        length: Patch tokens to be left, at least the largest count; images with fewer are padded with zeros.
        trace: Whether to say where each token went.

    Returns:
        P + `length` tokens. Sizes are 1, also of a word of many patches, which the paper does not weigh; 0 for padding.
    """
    batch, count, channels = tokens.shape
    slots, patches = grouping.slots, count - num_prefix_tokens
    row = torch.arange(batch, device=tokens.device).unsqueeze(1) * length
    flat = (slots + row).flatten()
    precise = torch.promote_types(tokens.dtype, torch.float32)
    sums = torch.zeros(batch * length, channels, dtype=precise, device=tokens.device)
    add_rows_(sums, flat, tokens[:, num_prefix_tokens:].to(precise).flatten(0, 1))
    members = torch.zeros(batch * length, dtype=precise, device=tokens.device)
    members = members.index_add(0, flat, members.new_ones(batch * patches))
    means = (sums / members.clamp(min=1).unsqueeze(1)).to(tokens.dtype).view(batch, length, channels)
    members = members.view(batch, length)
    # A word of one patch is that patch, and stands where it stood.
    places = torch.arange(num_prefix_tokens, count, device=tokens.device).expand(batch, -1)
    stood = places.new_zeros(batch, length).scatter_add(1, slots, places)
    positions = torch.where(members == 1, stood, -1)
    prefix = torch.arange(num_prefix_tokens, device=tokens.device).expand(batch, -1)
    sizes = torch.cat((tokens.new_ones(batch, num_prefix_tokens), (members > 0).to(tokens.dtype)), dim=1)
    return ReductionOutput(
        torch.cat((tokens[:, :num_prefix_tokens], means), dim=1),
        torch.cat((prefix, positions), dim=1),
        sizes,
        torch.cat((prefix, slots + num_prefix_tokens), dim=1) if trace else None,
    )


class VWTInter(Reduction):
    """Visual Word Tokenizer's inter-image reduction: before block 0, patches of the same visual word become one token.

    Source: arXiv 2411.15397. A patch is a word if its cosine distance (of raw normalised pixels) to the nearest word of
    the vocabulary is at most `threshold`; patches of one image that are the same word become the mean of their
    embeddings, positions included, and all other patches stay. How many tokens are left depends on the image, so there
    is no schedule. Shorter images of a batch are padded and the padding is masked, so that no image depends on its
    batch-mates; it therefore saves most at batch size 1. A token counts the same in attention however many patches it
    stands for, as in the paper. On the command line:

        lightning-prune vocabulary --config my.yaml --words 1000 --output words.safetensors
        lightning-prune validate --config my.yaml --prune.method VWTInter --prune.method.vocabulary words.safetensors

    Args:
        vocabulary: A `Vocabulary` for the model's patch size and normalisation, or its file, as
            `lightning-prune vocabulary` writes it.
        threshold: In [0, 2].
        pad_to: `"batch"`: to the longest image of the batch, which asks the device for that number: it synchronises
            once, and is no graph for `torch.compile(fullgraph=True)`. `"image"`: to all patch tokens. That saves
            nothing, but has one shape, so that it compiles and exports.

    Raises:
        ArgumentError: If an argument is unusable.
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
                "vwt-inter needs a vocabulary: learn one by `lightning-prune vocabulary`, and give it as "
                "VWTInter('words.safetensors'); on the command line by --prune.method VWTInter "
                "--prune.method.vocabulary words.safetensors."
            )
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 2:
            raise ArgumentError(f"`threshold` must be a cosine distance in [0, 2], got {threshold!r}.")
        if pad_to not in get_args(PadTo):
            raise ArgumentError(f"`pad_to` must be 'batch' or 'image', got {pad_to!r}.")
        if not isinstance(vocabulary, str | Path | Vocabulary):
            raise ArgumentError(f"`vocabulary` must be a Vocabulary or the path of one, got {vocabulary!r}.")
        self.vocabulary = vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary.load(vocabulary)
        self.threshold = float(threshold)
        self.pad_to = pad_to

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        """See the class; `remove` is 0, for the images decide."""
        assert sequence.pixels is not None  # the patch provides what `reads` asks for
        patches = sequence.tokens.shape[1] - sequence.num_prefix_tokens
        grouping = group_by_word(sequence.pixels, patches, self.vocabulary, self.threshold)
        length = patches if self.pad_to == "image" else int(grouping.counts.max())
        return merge_groups(sequence.tokens, grouping, sequence.num_prefix_tokens, length, sequence.trace)

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        """All patch tokens but one: an image may show one word everywhere."""
        return max(tokens - num_prefix_tokens - 1, 0)

    def unsupported_reason(self, model: nn.Module) -> str | None:
        """Says where the vocabulary was made for another patch size, channel count or normalisation than the model."""
        words, config = self.vocabulary, getattr(model, "pretrained_cfg", None) or {}
        sides = _patch_sides(model)
        if sides is not None and sides != (words.patch_size,) * 2:
            return _another("patches of", f"{words.patch_size} x {words.patch_size}", " x ".join(map(str, sides)))
        for name in ("mean", "std"):
            own, theirs = getattr(words, name), config.get(name)
            if own is None or theirs is None or len(theirs) != words.channels:  # said of weights for other channels
                continue
            if max(abs(a - b) for a, b in zip(own, theirs, strict=True)) > 1e-3:
                return _another(f"images normalised by {name}", f"{own}", f"{tuple(theirs)}")
        return None

    def settings(self) -> dict[str, Any]:
        """Plain values; the vocabulary by its file, or by the beginning of its digest."""
        words = self.vocabulary
        return {
            "vocabulary": words.source or f"sha256:{words.digest[:12]}",
            "threshold": self.threshold,
            "pad_to": self.pad_to,
        }


def _patch_sides(model: nn.Module) -> tuple[int, ...] | None:
    """The sides of a model's patches where it says them; None where only its first images will show."""
    embed: Any = getattr(model, "patch_embed", None)
    if hasattr(embed, "feat_ratio"):  # timm, also where a network of convolutions comes before the patches
        sides = embed.feat_ratio(as_scalar=False)
    else:  # torchvision, Hugging Face
        sides = getattr(model, "patch_size", getattr(getattr(model, "config", None), "patch_size", None))
    return (sides, sides) if isinstance(sides, int) else tuple(sides) if sides is not None else None


def _another(what: str, own: str, theirs: str) -> str:
    return f"The vocabulary of vwt-inter is for {what} {own}, this model for {theirs}; learn one for this model."


def _check_patches(vocabulary: Vocabulary, values: int, channels: int) -> None:
    if values == vocabulary.centroids.shape[1] and channels == vocabulary.channels:
        return
    side = int((values // channels) ** 0.5)
    own = f"{vocabulary.channels} x {vocabulary.patch_size} x {vocabulary.patch_size}"
    raise ArgumentError(_another("patches of", own, f"{channels} x {side} x {side}"))


class TokensPerImage(NamedTuple):
    """Patch tokens that images are left with; prefix tokens come on top.

    Attributes:
        images: How many images were looked at.
        patches: Patch tokens of the dense model, of the largest image where they differ.
        mean: Over the images.
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
            f"{self.mean:.1f} of {self.patches} patch tokens an image are left (5th percentile {self.low:.0f}, 95th "
            f"{self.high:.0f}; {self.images} images)"
        )


def tokens_per_image(batches: Iterable[Tensor], vocabulary: Vocabulary, threshold: float = 0.1) -> TokensPerImage:
    """Counts the patch tokens that images would be left with by `VWTInter(vocabulary, threshold)`.

    Args:
        batches: Images (B, channels, height, width) as the model sees them; on any device.
        vocabulary: The visual words.
        threshold: Largest cosine distance at which a patch is a word.

    Raises:
        DataError: If there is no image.
        ArgumentError: If the vocabulary is for other channels.

    Example:
        >>> import torch
        >>> import lightning_prune as lp
        >>> from lightning_prune.reduction import tokens_per_image
        >>> images = torch.rand(4, 3, 1, 1).expand(4, 3, 32, 32)  # one colour each
        >>> words = lp.learn_vocabulary([images], patch_size=8, words=4)
        >>> print(tokens_per_image([images], words))
        1.0 of 16 patch tokens an image are left (5th percentile 1, 95th 1; 4 images)
    """
    counts, most, side = [], 0, vocabulary.patch_size
    for images in batches:
        patches = (images.shape[2] // side) * (images.shape[3] // side)
        counts.append(group_by_word(images, patches, vocabulary, threshold).counts.double().cpu())
        most = max(most, patches)
    if not counts:
        raise DataError("There is no image to count the tokens of.")
    together = torch.cat(counts)
    low, high = together.quantile(torch.tensor([0.05, 0.95], dtype=together.dtype)).tolist()
    return TokensPerImage(len(together), most, together.mean().item(), low, high)
