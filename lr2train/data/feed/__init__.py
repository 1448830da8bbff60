"""From a step's number to its batches: the order of segments, the loader, reading ahead, and the curriculum of a base model."""
