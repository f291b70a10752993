"""Checkpoints of a run that are whole or not there."""
