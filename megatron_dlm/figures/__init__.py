"""What is drawn, and how all figures look."""
