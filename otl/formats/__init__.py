"""File formats as pure functions from dict to dict."""
