"""The command line: what is typed, what Hydra composes of it, and how a verb starts and ends."""
