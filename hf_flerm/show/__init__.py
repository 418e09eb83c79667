"""A profile for people: summary, figures, HTML report, model-card section."""
