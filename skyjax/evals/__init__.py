"""Checkpoints to numbers: probes on frozen features, the baselines beside them, the report."""
