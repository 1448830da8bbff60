"""Model folders for other runtimes: attention factor in the weights, three folders, what each runtime reads."""
