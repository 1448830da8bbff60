"""From document lengths to a table of segments: buckets, the mix of sources, packing."""
