"""The `per_example` estimator: per-example directional derivatives, computed by hooks in one backward pass."""
