"""What training by slices reaches on real tasks, beside other ways and other settings."""
