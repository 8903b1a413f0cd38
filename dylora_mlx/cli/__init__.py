"""The command line: the parser all commands share, and the options of train, add, plan and estimate."""
