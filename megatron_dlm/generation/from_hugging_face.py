"""Hugging Face directories as models of ours: exports, and autoregressive models of transformers' own classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_dlm.errors import ConfigError
from megatron_dlm.files import read_json_object
from megatron_dlm.packages import optional_module
from megatron_dlm.shipped.sampler import Denoise, Samples, Step
from megatron_dlm.shipped.sampler_plan import SamplerOptions, Vocabulary

_AUTOREGRESSIVE = ("qwen3", "llama")
_REPORTED = ("missing_keys", "unexpected_keys", "mismatched_keys")


def load_model(path: str) -> Any:
    """The model in evaluation mode, on a GPU if there is one; no code of the directory is run.

    Raises:
        ConfigError: it cannot be read, or is of another architecture.
        DataError: transformers is not installed.
    """
    transformers = optional_module("transformers", f"the model {path}")
    model_type = read_json_object(Path(path) / "config.json", "export the model again").get("model_type")
    if model_type == "megatron_dlm":
        from megatron_dlm.shipped.modeling_dlm import DLMForMaskedDiffusion

        kind: Any = DLMForMaskedDiffusion
    elif model_type in _AUTOREGRESSIVE:
        kind = transformers.AutoModelForCausalLM
    else:
        known = ", ".join(("megatron_dlm", *_AUTOREGRESSIVE))
        raise ConfigError(f"{path} has model_type {model_type!r}; only {known} can be sampled here")
    transformers.utils.logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(path, dtype="auto", output_loading_info=True, use_safetensors=True)
    except Exception as error:  # a wrong value in config.json or a damaged file raises nearly anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(f"cannot load {path}: {reason}; export the model again") from None
    # transformers fills in what is missing with random numbers.
    faults = [f"{key.removesuffix('_keys')} {min(map(str, report[key]))}" for key in _REPORTED if report.get(key)]
    if faults:
        raise ConfigError(
            f"the weights of {path} are not those of its config.json ({', '.join(faults)}); export it again"
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ConfigError(f"{name} of {path} has values that are not finite numbers; export the model again")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def causal_denoise(model: Any) -> Denoise:
    """Logits of the tokens that follow the positions asked for; the head is computed for no others.

    Padding is at the right, where causal attention does not look, so the lengths need no mask.
    """

    @torch.no_grad()
    def denoise(tokens: torch.Tensor, lengths: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        return model.get_output_embeddings()(hidden.flatten(0, 1)[rows])

    return denoise


def cached_generation(model: Any) -> Callable[..., Samples]:
    """``TextModel.generate`` for an autoregressive model: transformers' own loop, with its cache of keys and values.

    Prompts begin with the token that the model's configuration says (``bos_token_id``). The random numbers are
    torch's, seeded with ``options.seed``, so a row depends on those beside it.
    """
    first = [] if model.config.bos_token_id is None else [model.config.bos_token_id]
    from transformers import GenerationConfig, StoppingCriteriaList

    model.generation_config = GenerationConfig()  # what the directory asks for is not what the options say

    def generate(
        prompts: Sequence[Sequence[int]],
        options: SamplerOptions,
        *,
        vocabulary: Vocabulary,
        max_new_tokens: int,
        on_step: Callable[[Step], None] | None = None,
    ) -> Samples:
        inputs = [[*first, *prompt] for prompt in prompts]
        width = max(map(len, inputs))
        if min(map(len, inputs)) == 0 or max_new_tokens < 1:
            raise ValueError("this model needs a prompt and new tokens: give a longer prompt and max_new_tokens")
        end = vocabulary.end_of_document_id
        padding = end if end is not None and end < model.config.vocab_size else 0
        # Padded at the left, so that all rows are continued from the same column.
        ids = torch.tensor([[padding] * (width - len(row)) + row for row in inputs], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in inputs], device=model.device)
        settings: dict[str, Any] = {"do_sample": False}
        if options.temperature:
            settings = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
        # Everything that decides on the text is given here; nothing comes from the directory.
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            suppress_tokens=vocabulary.unwritten,
            eos_token_id=end,
            pad_token_id=padding,
            **settings,
        )
        watch = _Watch(prompts, width, vocabulary.mask_token_id, max_new_tokens, on_step)
        # transformers draws from torch's global generator, which a caller's program may be using too.
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(options.seed)
            output = model.generate(
                ids, attention_mask=mask, generation_config=config, stopping_criteria=StoppingCriteriaList([watch])
            )
        new = output[:, width:].tolist()
        # The loop ends when all rows have ended: shorter by what no row has needed.
        filled = [row + [padding] * (max_new_tokens - len(row)) for row in new]
        rows = [[*prompt, *row] for prompt, row in zip(prompts, filled, strict=True)]
        lengths = [len(prompt) for prompt in prompts]
        return Samples(rows, lengths, end, watch.forwards, watch.forwards * len(prompts))

    return generate


class _Watch:
    """A stopping criterion that stops nothing: it counts the forwards and shows their tokens."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        width: int,
        mask: int,
        max_new_tokens: int,
        on_step: Callable[[Step], None] | None,
    ) -> None:
        self.on_step, self.width, self.forwards = on_step, width, 0
        self.starts = torch.tensor([len(prompt) for prompt in prompts])
        self.lengths = [len(prompt) + max_new_tokens for prompt in prompts]
        self.tokens = torch.tensor([[*p, *[mask] * (max(self.lengths) - len(p))] for p in prompts], dtype=torch.int64)
        self._show(torch.zeros_like(self.tokens, dtype=torch.bool))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        column = self.starts + self.forwards
        self.forwards += 1
        self.tokens[torch.arange(len(self.tokens)), column] = input_ids[:, -1].cpu()
        self._show(torch.zeros_like(self.tokens, dtype=torch.bool).scatter_(1, column[:, None], True))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def _show(self, revealed: torch.Tensor) -> None:
        if self.on_step:
            # transformers' loop does not give the probabilities of its choices.
            confidence = torch.zeros(revealed.shape)
            self.on_step(Step(self.forwards, self.tokens.clone(), self.lengths, revealed, confidence))
