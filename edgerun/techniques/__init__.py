"""What is done to a model before it is exported: one technique a file, citing its paper and marking what is ours."""
