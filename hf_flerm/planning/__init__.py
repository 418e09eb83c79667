"""`plan`: the learning rate that a model wants, from a few training steps on a copy."""
