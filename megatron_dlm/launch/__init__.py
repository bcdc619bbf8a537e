"""Processes of a run: started here or joined, stopped by signals, ended with one line and an exit code."""
