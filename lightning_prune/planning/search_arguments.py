"""What `plan_blocks` can be given, refused before anything is measured."""

from collections.abc import Sequence

from torch import Tensor

from lightning_prune.errors import ArgumentError, UnsupportedModelError
from lightning_prune.patching import VisionTransformer
from lightning_prune.patching.checks import check_reduction
from lightning_prune.planning.labels import labels_of
from lightning_prune.planning.objective import Objective
from lightning_prune.planning.proxy_curve import check_images
from lightning_prune.profiling.latency import check_measurable
from lightning_prune.reduction import Reduction, resolve


def check_inputs(
    transformer: VisionTransformer, images: object, example_batch: Tensor, objective: object, max_seconds: float
) -> None:
    """Raises ArgumentError, with what was expected and what came, where one of these cannot be used."""
    check_images(images)
    if max_seconds is None:  # which profiling takes for no limit, and a search would never end
        raise ArgumentError("`max_seconds` must be a number > 0, got None.")
    check_measurable(transformer, example_batch, max_seconds)
    assert isinstance(images, Tensor)
    if images.shape[1:] != example_batch.shape[1:]:
        raise ArgumentError(
            f"`images` must be of the size of `example_batch`, {tuple(example_batch.shape[1:])}, got "
            f"{tuple(images.shape[1:])}."
        )
    if not isinstance(objective, Objective):
        raise ArgumentError(f"`objective` must be an Objective such as Utility(0.5), got {objective!r}.")


def usable_methods(methods: Sequence[str | Reduction], transformer: VisionTransformer) -> list[Reduction]:
    """The methods that can be used with this model; at least one.

    Args:
        methods: Names or reductions.
        transformer: The Vision Transformer.

    Raises:
        ArgumentError: If one does not act in blocks, the images decide how many tokens go, or two are the same.
        UnsupportedModelError: If none fits.
    """
    if not isinstance(methods, list | tuple):
        raise ArgumentError(f"`methods` must be a list of names or reductions, got {methods!r}.")
    if not methods:
        raise ArgumentError("`methods` must hold at least one method, got none.")
    found: list[Reduction] = []
    reasons: list[str] = []
    for method in methods:
        reduction = resolve(method)
        _check_hash(reduction)
        if reduction.site != "block" or reduction.adaptive:
            raise ArgumentError(
                f"Only methods that act in blocks can be planned over several of them; {reduction.name} does not."
            )
        try:
            check_reduction(transformer, reduction, at=None)
            found.append(reduction)
        except UnsupportedModelError as error:
            reasons.append(f"{reduction.name}: {error}")
    if not found:
        raise UnsupportedModelError(f"None of the methods can be used with this model. {'; '.join(reasons)}")
    labels_of(found)
    return found


def _check_hash(reduction: Reduction) -> None:
    try:
        hash(reduction)
    except TypeError as error:
        raise ArgumentError(
            "A method that is searched over blocks must have a hash, by which what was measured of it is kept (a "
            f"dataclass: frozen=True, and settings that have one); got {reduction!r}: {error}."
        ) from error
