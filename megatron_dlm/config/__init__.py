"""The configuration tree: its keys, reading it, checking it."""
