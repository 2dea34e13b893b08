"""One tensor of one delta in, one out."""
