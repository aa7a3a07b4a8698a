"""Features to losses: multi-granularity self-distillation, cross-modal alignment, spread."""
