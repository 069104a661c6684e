"""Suites: many checkpoints on many tasks, by any number of processes."""
