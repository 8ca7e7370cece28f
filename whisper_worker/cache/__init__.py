"""The model cache: where weights come from and how they lie on disk."""
