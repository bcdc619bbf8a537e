"""What ships inside exports, verbatim: torch and transformers are all that these files import."""
