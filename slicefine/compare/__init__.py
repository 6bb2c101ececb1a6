"""`slicefine compare`: methods of fine-tuning side by side on the user's own data."""
