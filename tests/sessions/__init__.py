"""What a user holds, on real bundles."""
