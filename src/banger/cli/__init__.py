"""The command line: parses, asks the daemon, draws the answer."""
