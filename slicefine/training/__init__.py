"""`slicefine train` without the command line."""
