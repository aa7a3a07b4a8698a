"""Checkpoints to other frameworks and back."""
