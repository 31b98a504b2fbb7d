import pytest
import torch

from helpers import reference as naive
from lightning_prune.errors import ArgumentError, ScheduleError
from lightning_prune.reduction import PiToMe, TokenSequence, pitome, pitome_energy, pitome_margin
from lightning_prune.reduction.merge_schedule import allocate_by_rate, max_allocatable

from .drawn import PRECISIONS, check_alone_and_together, check_one_graph, draw


def sized(sequence: TokenSequence) -> TokenSequence:
    """The sequence after an earlier block merged tokens."""
    shape, generator = sequence.tokens.shape[:2], torch.Generator().manual_seed(3)
    return sequence._replace(sizes=torch.randint(1, 9, shape, generator=generator).double())


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("patches", [3, 10])
@pytest.mark.parametrize(("block", "depth"), [(0, 1), (3, 12), (11, 12)])
def test_every_remove_matches_the_reference(prefix: int, patches: int, block: int, depth: int) -> None:
    sequence = draw(2, patches, prefix, trace=True)._replace(block=block, depth=depth)
    sequence = sized(sequence) if block else sequence
    attention, margin = sequence.attention, 0.9 * (1 - block / depth)
    assert attention is not None
    most = PiToMe().max_removed(prefix + patches, prefix)
    assert most == patches // 2
    for remove in range(1, most + 1):
        found = PiToMe().reduce(sequence, remove)
        assert found.sizes is not None
        assert found.sources is not None
        for b in range(2):
            known = None if sequence.sizes is None else sequence.sizes[b].tolist()
            rows, places, sizes, sources = naive.pitome(
                sequence.tokens[b], attention.key[b], remove, prefix, margin, known
            )
            torch.testing.assert_close(found.tokens[b], rows, rtol=1e-12, atol=1e-13)
            assert found.positions[b].tolist() == places
            assert found.sizes[b].tolist() == sizes
            assert found.sources[b].tolist() == sources


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), *PRECISIONS])
@pytest.mark.parametrize("margin", [0.9, 0.0])
def test_energy_matches_the_reference(dtype: torch.dtype, tolerance: float, margin: float) -> None:
    """Keys in half precision are read as they are, but all is computed in float32."""
    attention = draw(2, dtype=dtype).attention
    assert attention is not None
    found = pitome_energy(attention.key, 1, margin)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for b in range(2):
        expected = torch.tensor(naive.pitome_energy(attention.key[b], 1, margin), dtype=found.dtype)
        torch.testing.assert_close(found[b], expected, rtol=min(tolerance, 1e-5), atol=min(tolerance, 1e-5))


def test_isolated_tokens_are_protected() -> None:
    """Three groups of like tokens and two that are like no other: these stay, bit-identically."""
    key = torch.eye(5).repeat_interleave(torch.tensor([4, 3, 3, 1, 1]), dim=0)
    key = (key + 0.01 * torch.randn(12, 5, generator=torch.Generator().manual_seed(0))).view(1, 1, 12, 5)
    tokens = torch.arange(12.0).view(1, 12, 1)
    merged = pitome(tokens, key, remove=5, num_prefix_tokens=0, margin=0.5)
    assert merged.positions[0, -2:].tolist() == [10, 11]
    assert merged.tokens[0, -2:, 0].tolist() == [10, 11]
    assert merged.sizes is not None
    assert merged.sizes[0].sum() == 12


def test_the_margin_falls_with_depth() -> None:
    assert [pitome_margin(block, 3) for block in range(3)] == pytest.approx([0.9, 0.6, 0.3])


def test_an_image_does_not_depend_on_its_batch() -> None:
    check_alone_and_together(PiToMe())


@pytest.mark.long
def test_compiles_and_exports_as_one_graph() -> None:
    check_one_graph(PiToMe())


@pytest.mark.parametrize(("tokens", "prefix", "first"), [(197, 1, 0), (26, 1, 1), (33, 2, 3)])
def test_every_total_is_met_with_a_constant_rate(tokens: int, prefix: int, first: int) -> None:
    depth, patches = 4, tokens - prefix
    most = max_allocatable(tokens, prefix, depth, first)
    assert PiToMe().max_total_removed(tokens, prefix, depth, first) == most
    for remove in range(most + 1):
        removed = PiToMe().allocate(remove, tokens, prefix, depth, first)
        assert removed == allocate_by_rate(remove, tokens, prefix, depth, first)
        assert (len(removed), sum(removed), sum(removed[:first])) == (depth, remove, 0)
        left, rate = patches, ((patches - remove) / patches) ** (1 / (depth - first))
        for index, each in enumerate(removed[first:], 1):
            assert each <= left // 2
            left -= each
            assert rate < 0.5 or abs(left - patches * rate**index) <= 1.5
    with pytest.raises(ScheduleError, match=rf"`remove` must be at most {most}, .* got {most + 1}"):
        PiToMe().allocate(most + 1, tokens, prefix, depth, first)


def test_attributes() -> None:
    method = PiToMe()
    assert (method.name, method.reads, method.multi_block) == ("pitome", {"attention"}, True)
    assert (method.is_lossless, method.tracks_sizes, method.proportional_attention) == (True, True, True)
    assert not PiToMe(False).proportional_attention
    assert method != PiToMe(False)
    assert method.settings() == {"proportional_attention": True}
    with pytest.raises(ArgumentError, match="`proportional_attention` must be True or False, got 3"):
        PiToMe(3)  # type: ignore[arg-type] # wrong on purpose
