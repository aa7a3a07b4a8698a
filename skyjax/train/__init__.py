"""Losses to checkpoints: state, step, loop, optimizer, checkpoint, metrics, preemption, watchdog, trained models."""
