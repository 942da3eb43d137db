"""The ops that edgerun brings, one a file: schema, fake and CPU implementation. Importing registers them with torch."""

from edgerun.ops import dhsa_attention, embedding_logits, embedding_lookup, rms_norm

__all__ = ["dhsa_attention", "embedding_logits", "embedding_lookup", "rms_norm"]
