"""The command line, one file per verb. `env` imports the standard library only."""
