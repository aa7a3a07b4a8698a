"""Batches -> features: the encoder and its parts. Arrays in, arrays out; no files, meshes, optimizers or logging."""
