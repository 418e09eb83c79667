"""The `per_example` estimator: per-example directional derivatives, read off by hooks in one backward pass."""
