"""Documents to tokens: which files are read, what is lost, and how several processes write the token stores."""
