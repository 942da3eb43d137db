"""What a user holds: one session is one bundle, loaded and running."""
