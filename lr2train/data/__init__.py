"""From documents to batches: sources -> tokens in a store -> a plan of segments -> a pure loader. numpy only; knows nothing of ranks beyond two integers."""
