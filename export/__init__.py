"""edgerun.export: a checkpoint becomes a bundle. Needs the `export` extra (transformers, torchao)."""

from edgerun.export.pipeline import export_bundle, plan
from edgerun.export.video_pipeline import export_video_bundle

__all__ = ["export_bundle", "export_video_bundle", "plan"]
