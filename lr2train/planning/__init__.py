"""What a run will need: memory, floating-point operations, hours. Arithmetic only: no weights, no GPU."""
