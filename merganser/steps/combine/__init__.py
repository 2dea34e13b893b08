"""One tensor of all experts in, one merged delta out."""
