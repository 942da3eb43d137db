"""Stage 4: lowering, one target a file."""
