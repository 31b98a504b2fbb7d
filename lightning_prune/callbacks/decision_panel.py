"""The panel that shows a decision on the terminal."""

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from lightning_prune._utils.formatting import model_title, timed_quantity, with_tail
from lightning_prune.callbacks.decision import Decision


def panel_of(decision: Decision) -> Panel:
    """The decision as a table: device, model, batch, tokens, latency, the reason, and how long it took.

    Args:
        decision: What was decided.

    Returns:
        The panel, as wide as its text; `rich` wraps it on narrow terminals.
    """
    context = decision.context
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    threads = f", {context.get('threads', '?')} threads" if context.get("device_type") == "cpu" else ""
    runtime = str(context.get("runtime", "torch"))
    runtime = "" if runtime.startswith("torch") else f", {runtime}"
    compiled = ", compiled" if context.get("compiled") else ""
    parameters = f", {context['parameters'] / 1e6:.1f} M parameters" if "parameters" in context else ""
    table.add_row("device", f"{context.get('device', '?')}{threads}{runtime}")
    table.add_row("model", f"{model_title(context)}{parameters}{compiled}")
    table.add_row("batch", f"{context.get('batch_size', '?')} images, {context.get('precision', '?')}")
    table.add_row("tokens", f"{decision.dense_tokens} -> {decision.tokens}")
    table.add_row("removed", _removed(decision))
    table.add_row(timed_quantity(context), _latency(decision))
    table.add_row("because", decision.reason)
    if decision.calibration:
        table.add_row("judged by", decision.calibration)
    if decision.reused:
        table.add_row("profile", f"of {decision.reused}, kept; `use_cache=False` measures it again")
    table.add_row("took", f"{decision.seconds:.0f} s")
    return Panel(table, title="Token pruning", title_align="left", expand=False)


def print_decision(decision: Decision, console: Console | None = None) -> None:
    """Prints the panel.

    Args:
        decision: What was decided.
        console: Where to print; the standard output if None.
    """
    (console or Console()).print(panel_of(decision))


def _removed(decision: Decision) -> str:
    """How many tokens which block removes, and by which method."""
    schedule = decision.schedule
    if decision.adaptive:
        return f"depends on the image ({decision.method})"
    if not schedule.total_removed:
        return "R = 0"
    named = schedule.methods if decision.is_mixed else {}
    blocks = [
        f"block {block}: {named[block]}: {remove}" if named else f"{remove} at block {block}"
        for block, remove in schedule.reducing.items()
    ]
    by_rate = " by keep rate" if decision.keep_rates is not None else ""
    return f"R = {schedule.total_removed} ({decision.method}: {', '.join(blocks)}{by_rate})"


def _latency(decision: Decision) -> str:
    dense = f"dense {with_tail(decision.dense_ms, decision.dense_p90_ms)}"
    if not decision.prunes:
        return dense
    if decision.plan is not None and decision.plan.pruned is None:  # planned for another device
        return f"{dense}, predicted {decision.latency_ms:.2f} ms, not measured: {decision.speedup:.2f}x"
    predicted = f" (predicted {decision.predicted_ms:.2f} ms)" if decision.predicted_ms is not None else ""
    pruned = with_tail(decision.latency_ms, decision.p90_ms)
    return f"{dense}, pruned {pruned}{predicted}: {decision.speedup:.2f}x"
