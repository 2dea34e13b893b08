"""Where the bytes are: a model is a mapping from name to tensor, in memory or on disk."""
