"""From documents to batches: sources -> tokens in a store -> a plan of segments -> a pure loader.

numpy only; of ranks it knows two integers.
"""
