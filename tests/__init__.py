"""Tests, in the shape of the tree they test; packages, so that two may share a file name."""
