"""What people look at: tables, plots and the HTML page."""

from lightning_prune.report.plots import plot

__all__ = ["plot"]
