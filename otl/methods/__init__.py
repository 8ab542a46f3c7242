"""What trains: one file a method."""
