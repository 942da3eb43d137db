"""The verbs of `edgerun`, one a module: SUMMARY, `add_arguments`, `run`, and the typed function behind it."""
