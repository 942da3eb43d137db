"""Accuracy on the task: generated retrieval prompts, their scorers and the statistics of a comparison."""
