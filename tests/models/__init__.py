"""Model loading and the eight decoder families."""
