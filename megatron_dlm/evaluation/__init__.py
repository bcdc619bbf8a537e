"""What a model knows: held-out likelihood bounds."""
