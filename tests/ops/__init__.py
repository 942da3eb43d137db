"""One op a file, against an independent truth."""
