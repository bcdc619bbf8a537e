"""Hugging Face: the model class that ships inside exports, and conversion both ways."""
