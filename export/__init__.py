"""edgerun.export: a checkpoint becomes a bundle. Needs the `export` extra (transformers, torchao)."""

from edgerun.export.pipeline import export_bundle, plan

__all__ = ["export_bundle", "plan"]
