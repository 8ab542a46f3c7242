"""How fast OTL is, always beside something else measured in the same run."""
