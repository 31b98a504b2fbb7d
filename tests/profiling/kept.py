"""What the tests of kept measurements share: a small profile, its conditions, and models that cannot be compared."""

from dataclasses import replace

from helpers.data import noise_images
from helpers.models import tiny_vit
from lightning_prune.patching import find_vision_transformer
from lightning_prune.profiling import (
    LatencyProfile,
    measurement_context,
    profile_dependencies,
)
from lightning_prune.reduction import resolve
from lightning_prune.runtimes.torch_runtime import Compiled

IMAGES = noise_images(2)
POMT = resolve("pomt")


def profile(ms=1.0, **changes):
    context = measurement_context(tiny_vit(), IMAGES) | {"measured": "once"}
    curve = LatencyProfile((9, 17), (ms, 2.0), (0.01, 0.01), (9, 9), "pomt", 1, 4, context=context)
    return replace(curve, **changes)


def dependencies(model=None, images=IMAGES, method=POMT, block=1):
    model = tiny_vit() if model is None else model
    return profile_dependencies(find_vision_transformer(model), images, method, block)


def by_us(mode):
    model = tiny_vit()
    Compiled(model, mode, list(model.blocks))
    return model


def compiled(**kwargs):
    model = tiny_vit()
    model.compile(**kwargs)
    return model


def with_a_compiled_block():
    model = tiny_vit()
    model.blocks[1].compile(backend="eager")
    return model


def hooked(method):
    model = tiny_vit()
    getattr(model.blocks[2].mlp, method)(lambda *_: None)
    return model


def with_a_replaced_method(name):
    model = tiny_vit()
    setattr(model, name, getattr(model, name))  # as a wrapper would
    return model
