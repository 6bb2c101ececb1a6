"""What a few weights can hold, and what they forget: capacity, patches, continual learning. Imported only when asked for."""
