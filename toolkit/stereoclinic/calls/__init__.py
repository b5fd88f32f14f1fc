"""The public calls: one for each command, doing all that the command does."""
