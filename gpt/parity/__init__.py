"""Proof that the implementations agree, layer by layer and as whole models, and that the proof would notice."""
