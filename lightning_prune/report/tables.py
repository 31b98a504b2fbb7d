"""A latency profile as a table, and its shape in words."""

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from lightning_prune.profiling import LatencyProfile


def profile_table(profile: "LatencyProfile") -> Table:
    """A row a token count, dense first; counts just past a cliff stand out."""
    model, device, batch, precision = (
        profile.context.get(key, "?") for key in ("model", "device", "batch_size", "precision")
    )
    title = f"{model} on {device}, batch {batch}, {precision}"
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in ("tokens", "latency ms", "speed-up", "saved a token, us"):
        table.add_column(heading, justify="right")
    cliffs = {cliff.below for cliff in profile.cliffs()}
    above: tuple[int, float] | None = None
    for tokens, latency in sorted(zip(profile.tokens, profile.milliseconds, strict=True), reverse=True):
        saved = f"{1e3 * (above[1] - latency) / (above[0] - tokens):.0f}" if above else ""
        spread = profile.spread[profile.tokens.index(tokens)]
        style = "bold red" if tokens in cliffs else None
        table.add_row(
            str(tokens), f"{latency:.2f} ± {spread:.2f}", f"{profile.dense_ms / latency:.2f}x", saved, style=style
        )
        above = (tokens, latency)
    return table


def shape_of(profile: "LatencyProfile") -> str:
    """Cliffs and plateaus in a line."""
    cliffs = ", ".join(f"{cliff.above} -> {cliff.below} tokens" for cliff in profile.cliffs()) or "none"
    plateaus = ", ".join(f"{flat.above} to {flat.below} tokens" for flat in profile.plateaus()) or "none"
    simulated = profile.context.get("device_type") == "simulated"
    took = f"Simulated: {profile.seconds:.0f} s there." if simulated else f"Measured in {profile.seconds:.0f} s."
    return f"Cliffs: {cliffs}. Plateaus: {plateaus}. {took}"


def beside_eager(compiled: "LatencyProfile", eager: "LatencyProfile") -> str:
    """What compiling brings with all tokens, and what pruning brings under each of the two."""
    fewest = compiled.tokens[0]
    best = [profile.dense_ms / min(profile.milliseconds) for profile in (compiled, eager)]
    return (
        f"Dense takes {compiled.dense_ms:.2f} ms compiled and {eager.dense_ms:.2f} ms eagerly; pruned, down to "
        f"{fewest} tokens, it is up to {best[0]:.2f}x as fast compiled, {best[1]:.2f}x eagerly."
    )
