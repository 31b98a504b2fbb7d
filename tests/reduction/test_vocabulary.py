"""Learning, saving and loading visual words."""

import copy
import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lightning_prune as lp
from lightning_prune.errors import ArgumentError, DataError, FileFormatError
from lightning_prune.reduction.vocabulary import Vocabulary
from lightning_prune.reduction.word_learning import WordLearner


def draw(images: int = 6, channels: int = 3, size: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(images, channels, size, size, generator=torch.Generator().manual_seed(seed))


def vocabulary(**options: object) -> Vocabulary:
    settings = {"patch_size": 8, "words": 9, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.25), **options}
    return lp.learn_vocabulary([draw()], progress=False, **settings)


def test_words_are_the_means_of_clear_clusters() -> None:
    """Four kinds of patches with noise give four words, each the mean of its kind."""
    generator = torch.Generator().manual_seed(0)
    kinds = 5 * torch.randn(4, 2 * 4 * 4, generator=generator)
    of = torch.randint(0, 4, (40, 9), generator=generator)
    noise = 0.01 * torch.randn(40, 9, 32, generator=generator)
    patches = (kinds[of] + noise).view(40, 3, 3, 2, 4, 4)
    images = patches.permute(0, 3, 1, 4, 2, 5).reshape(40, 2, 12, 12)
    learned = lp.learn_vocabulary(images.split(7), patch_size=4, words=4, progress=False)
    distances = torch.cdist(kinds, learned.centroids)
    assert sorted(distances.argmin(dim=1).tolist()) == [0, 1, 2, 3]
    assert distances.amin(dim=1).max() < 0.05
    assert (len(learned), learned.channels, learned.patch_size, learned.patches) == (4, 2, 4, 360)


def test_as_many_words_as_patches_reproduce_the_patches() -> None:
    learned = lp.learn_vocabulary([draw(1)], patch_size=8, words=9, progress=False)
    patches = torch.stack([draw(1)[0, :, y : y + 8, x : x + 8].flatten() for y in (0, 8, 16) for x in (0, 8, 16)])
    assert torch.cdist(patches, learned.centroids).amin(dim=1).max() < 1e-4


def test_words_depend_on_the_seed_and_not_on_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_prune.reduction.word_learning._MIN_BATCH", 20)
    images = draw(12)
    one, *others, seeded = (
        lp.learn_vocabulary(images.split(size), patch_size=8, words=6, seed=seed, progress=False)
        for size, seed in ((3, 0), (1, 0), (5, 0), (12, 0), (3, 1))
    )
    assert all(other == one for other in others)
    assert seeded != one
    assert one.patches == 12 * 9


def test_many_words_are_initialised_with_random_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_prune.reduction.word_learning._MAX_KMEANS_PP", 5)
    made = [lp.learn_vocabulary([draw(12)], patch_size=8, words=6, seed=seed, progress=False) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    assert torch.cdist(made[0].centroids, made[0].centroids).fill_diagonal_(9).min() > 0.1, "no word twice"


def test_finish_can_be_called_between_batches() -> None:
    learner = WordLearner(patch_size=8, words=4)
    learner.add(draw(2))
    before = learner.finish()
    assert learner.finish() == before
    learner.add(draw(2, seed=1))
    assert learner.finish() != before


def test_half_precision_images_give_float32_words() -> None:
    assert (
        lp.learn_vocabulary([draw().bfloat16()], patch_size=8, words=5, progress=False).centroids.dtype is torch.float32
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": 55}, "`words` must be at most the number of patches, 54 of 6 images, got 55."),
        ({"words": 0}, "`words` must be a number of words >= 1, got 0."),
        ({"words": 2.5}, "`words` must be a number of words >= 1, got 2.5."),
        ({"patch_size": 0}, "`patch_size` must be a number of pixels >= 1, got 0."),
        ({"seed": -1}, r"`seed` must be an integer in \[0, 2\^32 - 1\], got -1"),
        ({"mean": (0.5,)}, r"`mean` must be one number for each of 3 channels, got \(0.5,\)."),
    ],
)
def test_invalid_arguments_are_rejected(options: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        vocabulary(**options)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "`batches` must hold at least one image, got none"),
        ([draw()[0]], r"`images` must be .* got \(3, 24, 24\)."),
        ([draw(size=6)], r"`images` must be .* >= 8, .* got \(6, 3, 6, 6\)"),
        ([draw() / 0], "`images` must hold finite numbers"),
        ([draw(), draw(channels=1)], "`images` must have 3 channels, .* got 1"),
    ],
)
def test_invalid_data_are_rejected(batches: list[Tensor], message: str) -> None:
    with pytest.raises(DataError, match=message):
        lp.learn_vocabulary(batches, patch_size=8, words=5, progress=False)


def test_other_channels_are_rejected_after_a_step() -> None:
    learner = WordLearner(patch_size=1, words=2)
    learner.add(draw(2))  # more than a step
    assert learner.images == 2
    with pytest.raises(DataError, match=r"`images` must have 3 channels, .* got 1"):
        learner.add(draw(channels=1))


def test_save_and_load_keep_everything(tmp_path: Path) -> None:
    made = vocabulary(seed=3)
    path = made.save(tmp_path / "deep" / "words.safetensors")
    read = Vocabulary.load(path)
    assert read == made
    assert torch.equal(read.centroids, made.centroids)
    names = ("patch_size", "channels", "mean", "std", "patches", "seed", "digest")
    assert [getattr(read, name) for name in names] == [getattr(made, name) for name in names]
    assert (made.seed, made.patches, read.source, made.source) == (3, 54, str(path), "")
    assert repr(read) == f"Vocabulary(9 words of 3 x 8 x 8, {made.digest[:12]})"


def test_another_suffix_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"`path` must be .*\.safetensors, got '.*words\.pt'"):
        vocabulary().save(tmp_path / "words.pt")
    assert not list(tmp_path.iterdir())


def rewritten(path: Path, **changes: object) -> Path:
    """Rewrites the file with other metadata."""
    made = Vocabulary.load(path)
    facts = {"patch_size": 8, "channels": 3, "words": 9, "mean": None, "std": None, "patches": 54, "seed": 0}
    metadata = {"format": "lightning_prune.vocabulary", "version": "1", "facts": json.dumps(facts)}
    for key, value in changes.items():
        if key in facts:
            metadata["facts"] = json.dumps({**facts, key: value})
        elif value is None:
            del metadata[key]
        else:
            metadata[key] = str(value)
    save_file({changes.get("tensor", "centroids"): made.centroids}, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "file of version '2'; this release reads version 1"),
        (
            {"format": "others.words"},
            "is not a lightning_prune.vocabulary file: it has format 'others.words'",
        ),
        ({"format": None}, "it has no format entry"),
        ({"facts": None}, "damaged .*: 'facts'"),
        ({"facts": "{"}, "is a damaged"),
        ({"words": 8}, "its metadata contradict the shape of its words"),
        ({"channels": 1}, "its metadata contradict the shape of its words"),
        ({"patch_size": 7}, r"damaged .*`centroids` must be of shape \(words, channels \* 7 \* 7\)"),
        ({"mean": [1.0]}, "damaged .*`mean` must be one number for each of 3 channels"),
        ({"tensor": "weight"}, r"damaged .*`centroids` must be"),
    ],
)
def test_files_of_another_format_or_version_are_rejected(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = rewritten(vocabulary().save(tmp_path / "words.safetensors"), **changes)
    with pytest.raises(FileFormatError, match=message):
        Vocabulary.load(path)


def test_unreadable_files_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "words.safetensors"
    for missing in (path, tmp_path):
        with pytest.raises(FileFormatError, match=r"Cannot read .*: it does not exist or is a folder"):
            Vocabulary.load(missing)
    whole = vocabulary().save(path).read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:20], b"removed: [1]\n", struct.pack("<Q", 2**40) + b"{}"):
        path.write_bytes(content)
        with pytest.raises(
            FileFormatError, match=r"words\.safetensors is damaged or not a lightning_prune\.vocabulary"
        ):
            Vocabulary.load(path)
    path.write_bytes(pickle.dumps(exec))
    with pytest.raises(FileFormatError, match="is damaged or not"):
        Vocabulary.load(path)


def test_equality_copies_and_pickles_depend_on_content() -> None:
    made = vocabulary()
    same = Vocabulary(made.centroids, 8, made.mean, made.std, source="elsewhere")
    assert made == same
    assert hash(made) == hash(same)
    for other in (
        Vocabulary(made.centroids * 2, 8, made.mean, made.std),
        Vocabulary(made.centroids, 8, made.std, made.mean),
        Vocabulary(made.centroids, 4, None, None),
    ):
        assert made != other
    assert made != "words"
    assert copy.deepcopy(made) is made
    read = pickle.loads(pickle.dumps(made))
    assert read == made
    cpu = torch.device("cpu")
    assert torch.equal(read.units(cpu), made.units(cpu))


def test_words_are_copied_to_a_device_once() -> None:
    made = vocabulary()
    elsewhere = torch.device("meta")
    assert made.units(elsewhere) is made.units(elsewhere)
    torch.testing.assert_close(made.units(torch.device("cpu")).norm(dim=1), torch.ones(9))
    assert list(pickle.loads(pickle.dumps(made))._units) == [torch.device("cpu")]


def test_a_vocabulary_copies_its_inputs() -> None:
    words = torch.randn(4, 12)
    made = Vocabulary(words, 2)
    before = made.centroids.clone()
    words.zero_()
    assert torch.equal(made.centroids, before)


@pytest.mark.parametrize(
    ("centroids", "size", "message"),
    [
        (torch.randn(3, 10), 4, r"`centroids` must be of shape \(words, channels \* 4 \* 4\), got \(3, 10\)"),
        (torch.randn(0, 16), 4, r"got \(0, 16\)"),
        (torch.randn(16), 4, r"got \(16,\)"),
        (torch.full((2, 16), float("nan")), 4, "`centroids` must hold finite numbers"),
        (torch.randn(3, 16), 4.0, "`patch_size` must be a number of pixels >= 1, got 4.0"),
    ],
)
def test_invalid_centroids_are_rejected(centroids: Tensor, size: int, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Vocabulary(centroids, size)
