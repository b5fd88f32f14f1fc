"""The figures of an experiment as plain data, what each means, and what two results differ in."""
