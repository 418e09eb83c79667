"""From the rates of a base run to learning-rate scales on another model."""
