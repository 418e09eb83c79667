"""A profile for people: summaries, pictures, an HTML report, a section of the model card."""
