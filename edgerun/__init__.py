"""edgerun: a pretrained model in, a bundle for a phone or an edge board out, proven to compute the same."""

__version__ = "0.1.0"
