"""The command line of StereoClinic: one file a command. It parses, calls the toolkit and prints."""
