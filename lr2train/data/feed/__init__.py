"""From a step's number to its batches: order of segments, loader, reading ahead, curriculum of a base model."""
