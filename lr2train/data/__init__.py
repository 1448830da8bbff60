"""From documents to batches: sources -> tokens in a store -> tables of segments -> a pure loader.

numpy only, no torch. Of ranks, data knows two integers: the data-parallel rank and size.
"""
