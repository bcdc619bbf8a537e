"""What generating text and training cost, in FLOPs."""
