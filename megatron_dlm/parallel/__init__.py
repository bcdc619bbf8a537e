"""Process groups and everything about megatron-core that is not the model.

Importing this package prepares the machine for megatron-core: without a GPU the CPU backend is
installed first. Modules that import ``megatron.core`` therefore import this package before it.
"""

import warnings

from megatron_dlm.parallel import cpu_backend

# What megatron-core and its calls of torch warn about on every rank, and no user can change. That apex is absent is
# said once, by `megatron-dlm doctor`.
for _message, _category in (
    (r".*Apex (is|are) not installed", UserWarning),
    (r"full scope is deprecated", UserWarning),
    (r"`load_state_dict` is deprecated", FutureWarning),
    (r"\w+ is experimental and still under active development", UserWarning),
    (r"The \.grad attribute of a Tensor that is not a leaf", UserWarning),
    (r"`torch\.distributed\.\w+` is deprecated", FutureWarning),
):
    warnings.filterwarnings("ignore", message=_message, category=_category)
if cpu_backend.install_without_gpu():
    # The variable is CUDA_DEVICE_MAX_CONNECTIONS: with GPUs a user should know, without it says nothing.
    warnings.filterwarnings("ignore", message=r"When using .* it is recommended to set the environment variable CUDA")
