"""Looking into a model: what its numbers are, and how they came to be."""
