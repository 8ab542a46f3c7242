"""Settings that make no sense together, told before torch is imported."""
