"""edgerun: a pretrained model in, a bundle that runs on a phone or an edge board out, with proof that it computes the same."""

__version__ = "0.1.0"
