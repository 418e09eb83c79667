"""One optimizer step: the update it made, the scales it is made with, and what is known of optimizer classes."""
