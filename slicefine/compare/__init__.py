"""Methods of fine-tuning held against each other on one's own data."""
