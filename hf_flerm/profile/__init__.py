"""`RateProfile`: the rates of one run, its file, its metadata, and its way to the Hub."""
