"""The accuracy proxy against tokens, measured where it is asked for."""

from torch import Tensor, nn

from lightning_prune.errors import ArgumentError
from lightning_prune.patching import PatchHandle, find_vision_transformer
from lightning_prune.profiling import LatencyProfile, Proxy, spread_schedule
from lightning_prune.profiling.latency import check_dense, ready_to_run
from lightning_prune.progress import ticking
from lightning_prune.reduction import Random, Reduction, resolve

_BUSY = 32  # images in one pass that keep a device busy


class ProxyCurve:
    """The accuracy proxy at token counts, each measured once and only when it is asked for.

    Args:
        model: Any module that contains one Vision Transformer; dense and unpatched.
        images: (images, channels, height, width) calibration images.
        profile: The latency curve whose counts may be asked for.
        method: The reduction.
        labels: (images,) int64 or None; see `lightning_prune.profiling.Proxy`.
        batch_size: Images in one forward pass. If None, the profile's, or 32 if that is less and nothing is compiled.
        target: Dotted path of the transformer in `model`.
        progress: Shows a bar on a terminal.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        profile: LatencyProfile,
        method: str | Reduction = "pomt",
        *,
        labels: Tensor | None = None,
        batch_size: int | None = None,
        target: str | None = None,
        progress: bool = True,
    ) -> None:
        check_images(images)
        self.profile = profile
        self.values: dict[int, float] = {profile.dense_tokens: 1.0}
        self._transformer = find_vision_transformer(model, target)
        check_dense(self._transformer)
        self._reduction = Random(site="input") if profile.protocol == "paper" else resolve(method)
        self._show = progress
        device = next(self._transformer.root.parameters()).device
        with ready_to_run(self._transformer), ticking("Running the dense model", None, progress) as tick:
            size = batch_size or max(int(profile.context.get("batch_size", 1)), _BUSY)
            self._proxy = Proxy(self._transformer, images, device, size, labels, tick)
        self.name = self._proxy.name

    def __call__(self, tokens: int) -> float:
        """The proxy at one token count, relative to dense."""
        if tokens not in self.values:
            n, prefix = self.profile.dense_tokens, self._transformer.prefix_tokens
            schedule = spread_schedule(self._reduction, n - tokens, n, prefix, self.profile.depth, self.profile.block)
            with (
                ready_to_run(self._transformer),
                ticking(f"Accuracy at {tokens} tokens", None, self._show),
                PatchHandle(self._transformer, self._reduction, schedule),
            ):
                self.values[tokens] = self._proxy.measure()
        return self.values[tokens]


def check_images(images: object) -> None:
    """Raises ArgumentError if these are no images."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        came = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ArgumentError(f"`images` must be a tensor (images, channels, height, width), got {came}.")
