"""From documents to batches: sources -> tokens in a store -> tables of segments -> a pure loader.

numpy only, no torch. Data knows two integers about ranks: the data-parallel rank and size.
"""
