"""Model in, model out: weights become weights before anything is merged."""
