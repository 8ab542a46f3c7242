"""What describes images and finds things in them, for `task=caption` and `task=mask`."""
