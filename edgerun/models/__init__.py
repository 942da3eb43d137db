"""Models as edgerun runs and exports them: one architecture a file."""
