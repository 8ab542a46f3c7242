"""What describes images, for `task=caption`."""
