"""Where images come from: one file for each kind of source; nothing else knows what kinds there are."""
