"""Rate profiles: `RateProfile`, the file and metadata of a profile, and the Hub."""
