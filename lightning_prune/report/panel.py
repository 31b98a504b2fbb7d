"""The panel that a pruned run begins with."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

if TYPE_CHECKING:
    from lightning_prune.callbacks.decision import Decision


def decision_panel(decision: "Decision") -> Panel:
    """Device, model, N, chosen R and block, predicted and measured latency, why, and how long it took."""
    context = decision.context
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    threads = f", {context.get('threads', '?')} threads" if context.get("device_type") == "cpu" else ""
    compiled = ", compiled" if context.get("compiled") else ""
    parameters = f", {context['parameters'] / 1e6:.1f} M parameters" if "parameters" in context else ""
    table.add_row("device", f"{context.get('device', '?')}{threads}")
    table.add_row("model", f"{context.get('model', '?')}{parameters}{compiled}")
    table.add_row("batch", f"{context.get('batch_size', '?')} images, {context.get('precision', '?')}")
    removed = ", ".join(f"{remove} at block {block}" for block, remove in decision.schedule.reducing.items())
    removed += " by keep rate" if removed and decision.keep_rates is not None else ""
    table.add_row("tokens", f"{decision.dense_tokens} -> {decision.tokens}")
    how_many = f"R = {decision.schedule.total} ({decision.method}: {removed})" if removed else "R = 0"
    table.add_row("removed", f"as each image decides ({decision.method})" if decision.adaptive else how_many)
    table.add_row("latency", _latency(decision))
    table.add_row("because", decision.reason)
    if decision.calibration:
        table.add_row("judged by", decision.calibration)
    if decision.reused:
        table.add_row("profile", f"of {decision.reused}, kept; `refresh` measures it anew")
    table.add_row("took", f"{decision.seconds:.0f} s")
    return Panel(table, title="Token pruning", title_align="left", expand=False)


def print_decision(decision: "Decision", console: Console | None = None) -> None:
    """Prints the panel."""
    (console or Console()).print(decision_panel(decision))


def _latency(decision: "Decision") -> str:
    dense = f"dense {decision.dense_ms:.2f} ms"
    if not decision.prunes:
        return dense
    predicted = f" (predicted {decision.predicted_ms:.2f} ms)" if decision.predicted_ms is not None else ""
    return f"{dense}, pruned {decision.latency_ms:.2f} ms{predicted}: {decision.speedup:.2f}x"
