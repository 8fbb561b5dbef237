"""How good a model's answers are: other models score them, or choose between those of two models."""
