"""The subcommands of `megatron-dlm`, one module each."""
