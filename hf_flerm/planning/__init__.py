"""`plan`: the learning rate that a model needs, from a few training steps on a copy."""
