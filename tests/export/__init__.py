"""Export, lowering and the bundle a pipeline makes."""
