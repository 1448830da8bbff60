"""Mixed context window training on a DeepSpeed engine."""
