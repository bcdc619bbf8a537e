"""Text to token files: documents, tokenisation, what is held out."""
