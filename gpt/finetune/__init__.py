"""Finetuning: what a pretrained model learns a task from, as batches of `gpt.engine`."""
