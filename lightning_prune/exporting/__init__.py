"""The deliverable: a model as a folder that its runtime loads, checked against PyTorch. Starts at `export`."""

from lightning_prune.exporting.api import export
from lightning_prune.exporting.device_bundle import DeviceBundle, bundle
from lightning_prune.exporting.export_report import ExportReport
from lightning_prune.exporting.exported_model import ExportedModel, load_exported
from lightning_prune.exporting.parity import Parity

__all__ = ["DeviceBundle", "ExportReport", "ExportedModel", "Parity", "bundle", "export", "load_exported"]
