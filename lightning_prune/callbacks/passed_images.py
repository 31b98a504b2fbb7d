"""Calibration images as the step passes images to the transformer, where it changes those of the batch."""

from torch import Tensor

from lightning_prune.callbacks.batches import Calibration


def as_passed(sampled: Calibration, loaded: Tensor, passed: Tensor) -> Calibration:
    """Calibration images as the step passes images to the transformer; those of the first batch if that is not known.

    Args:
        sampled: Images as the loader yields them.
        loaded: (B, C, H, W) images of the first batch.
        passed: The same images as the step passed them.
    """
    if sampled.images.shape[1:] == passed.shape[1:] and loaded.shape == passed.shape:
        found = channelwise_affine(loaded.to(passed.device), passed)
        if found is not None:
            scale, shift = found
            passed_like = sampled.images * scale.cpu() + shift.cpu()
            return sampled._replace(images=passed_like.to(passed.dtype))
    source = "the first batch as the step passed it, since the step changes the images"
    return Calibration(passed.cpu(), None, source, sampled.targets)


def channelwise_affine(loaded: Tensor, passed: Tensor) -> tuple[Tensor, Tensor] | None:
    """Scale and shift (1, C, 1, 1) of each channel that turn images into others, as a normalisation does.

    Args:
        loaded: (B, C, H, W) images.
        passed: (B, C, H, W) images.

    Returns:
        The least-squares solution; None if it does not reproduce `passed` to within 2% of its spread.
    """
    x, y = loaded.float(), passed.float()
    over = (0, 2, 3)
    x_mean, y_mean = x.mean(over, keepdim=True), y.mean(over, keepdim=True)
    covariance = ((x - x_mean) * (y - y_mean)).mean(over, keepdim=True)
    scale = covariance / (x - x_mean).square().mean(over, keepdim=True).clamp_min(1e-12)
    shift = y_mean - scale * x_mean
    error = (scale * x + shift - y).abs().amax()
    return (scale, shift) if error <= 0.02 * y.std() else None
