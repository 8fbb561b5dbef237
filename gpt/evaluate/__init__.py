"""Evaluation: likelihoods, multiple choice, judges, and the adaptor of lm-evaluation-harness."""
