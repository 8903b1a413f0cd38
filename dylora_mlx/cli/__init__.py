"""The command line: the parser shared by all commands, and the options of train, add, data, plan and estimate."""
