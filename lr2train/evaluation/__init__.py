"""What came out: needle retrieval and perplexity by length."""
