"""Constants of what planning measures: shares of the time, numbers of images and of runs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MeasurementTuning:
    """Constants of the measurements. Shares are of the time that is left when a measurement begins.

    Attributes:
        overhead_share: Time limit of the timings from which the overhead of all methods follows.
        sensitivity_share: Time limit of the sensitivities of all methods.
        proxy_share: Time after which no proxy is measured any more before the first timing run.
        timing_share: Time limit of each timing run.
        sensitivity_shares: Where a block is measured, as shares of the largest number of tokens that a method removes.
            Between them the divergence is interpolated.
        batch_images: Images in one pass of the proxy and the sensitivity, at most or if the user's batch is larger.
        first_images: Images in the first batch of the sensitivity, unless there is time for fewer only.
        min_images: Calibration images that the proxy is measured on, whatever time it takes.
        passes_per_method: Passes over the calibration images that one method is expected to need.
        passes_per_budget: The same for each objective, where none depends on how the proxy falls with the latency.
        min_runs_per_probe: Runs of each schedule from which an overhead follows, warm-up included, whatever time it
            takes.
        min_proxies: Proxies that one method needs at least, on `min_images` images.
        min_uncertainty: Mean uncertainty of the dense model below which images are taken in a random order.
        kept_ratio: Kept estimates are used where they were made on at least this share of the images, or of the time,
            that there is now: their standard error is then at most 1.4 times as large. Nor on as many times more, as
            further ones would take too long.
    """

    overhead_share: float = 0.2
    sensitivity_share: float = 0.4
    proxy_share: float = 0.6
    timing_share: float = 0.4
    # Of a ViT with 12 blocks and 196 patch tokens, divergences by four of eight shares were off by a tenth, and those
    # by 32 of 384 images by a third.
    sensitivity_shares: tuple[float, ...] = (0.125, 0.375, 0.625, 1.0)
    batch_images: int = 32
    first_images: int = 8
    min_images: int = 32
    passes_per_method: int = 6
    passes_per_budget: int = 2
    min_runs_per_probe: int = 3
    min_proxies: int = 2
    min_uncertainty: float = 1e-3
    kept_ratio: float = 0.5


TUNING = MeasurementTuning()
