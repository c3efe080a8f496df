"""The command line, recipes, preflight and everything that starts processes."""
