"""The training objectives: what is masked, what is scored and with which weight."""
