"""What a measured latency holds for in a loop: so many images of such a size in a batch."""

from typing import Any, NamedTuple

from lightning_prune.callbacks.images import Extract, images_from_batch


class Form(NamedTuple):
    """The form of a batch: images, their height and their width."""

    images: int
    height: int
    width: int

    def difference(self, other: "Form") -> str | None:
        """How another batch differs, as the end of a sentence that begins with it; None where it does not."""
        if other.images != self.images:
            return f"has {other.images} images; the profile was made at a batch size of {self.images}"
        if other != self:
            now, then = (f"{form.height} x {form.width}" for form in (other, self))
            return f"has images of {now}; the profile was made for {then}"
        return None


def form_of(batch: Any, extract: Extract | None) -> Form | None:
    """The form of a batch; None where that cannot be said, which is no reason to end a run."""
    try:
        shape = images_from_batch(batch, extract).shape
    except Exception:
        return None
    return Form(shape[0], shape[2], shape[3])
