"""The experiment: pairs of DLMs and ARs over a grid, on top of the command line."""
