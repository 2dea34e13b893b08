"""One tensor of all experts in, shared coordinates and the way back out."""
