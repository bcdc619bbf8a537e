"""Token files to training sequences: tokenizers, and the resumable data order."""
