"""A training step of any rank of any layout in one process, with no GPU and no memory; and what it will cost."""
