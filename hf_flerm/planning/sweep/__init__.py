"""`sweep`: the best learning rate of a training, found by training copies of the model at several learning rates."""
