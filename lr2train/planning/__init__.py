"""Cost estimates: memory, FLOPs, GPU hours. Arithmetic alone: no weights, no GPU."""
