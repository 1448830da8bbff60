"""What ``doctor`` looks at: facts about a machine and its packages, and what is wrong with them."""
