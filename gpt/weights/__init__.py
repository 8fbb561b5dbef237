"""Published weights: where they come from, and loading them into a model."""
