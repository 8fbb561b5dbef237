"""Finetuning: adapters, tasks and their data, each on the one trainer."""
