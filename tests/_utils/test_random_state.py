"""The state of the generators that an object holds."""

import random
from types import SimpleNamespace

import numpy as np
import torch

from lightning_prune._utils.random_state import preserve_generators_of


def draws(holder):
    torch_one, numpy_one, legacy, python = (
        holder.generator,
        holder.transform.rng,
        holder.parts[0]["legacy"],
        holder.python,
    )
    return [
        torch.rand(1, generator=torch_one).item(),
        numpy_one.random(),
        legacy.random_sample(),
        python.random(),
    ]


def test_generators_in_attributes_objects_and_containers_are_put_back():
    holder = SimpleNamespace(
        generator=torch.Generator().manual_seed(0),
        transform=SimpleNamespace(rng=np.random.default_rng(0), weights=torch.ones(3)),
        parts=[{"legacy": np.random.RandomState(0)}],
        python=random.Random(0),
        paths=["a"] * 100_000,
    )
    holder.itself = holder
    with preserve_generators_of(holder):
        first = draws(holder)
        assert draws(holder) != first
    assert draws(holder) == first


def test_a_large_container_hides_no_generator_and_archives_are_not_read(tmp_path):
    np.savez(tmp_path / "a.npz", objects=np.array([{}], dtype=object))
    holder = SimpleNamespace(
        rng=np.random.default_rng(0),
        archive=np.load(tmp_path / "a.npz"),
        annotations={number: [number] for number in range(20_000)},
    )
    with preserve_generators_of((holder, None)):
        first = holder.rng.random()
    assert holder.rng.random() == first


def test_an_object_without_attributes_is_fine():
    with preserve_generators_of(3), preserve_generators_of(None):
        pass
