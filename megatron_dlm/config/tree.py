"""The one typed configuration tree: every key a run can have, its meaning, unit and default.

The text below each field is the help that `megatron-dlm train --help` prints. Files are read and written by
`load`, contradictions between keys are found by `check`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_dlm.config.kinds import KINDS, Kind


@dataclass
class RunConfig:
    """Where a run writes, and its seed."""

    directory: str = "runs/default"
    """Directory of everything the run writes: checkpoints, metrics.jsonl, TensorBoard events, status.json."""
    seed: int = 1234
    """Seed of the weights, the data order and the noise (0 to 2**64 - 1)."""
    timeout_minutes: float = 30.0
    """Longest that ranks wait for each other at the start, in the first step and in a save (minutes); 0: for ever."""
    step_timeout_minutes: float = 10.0
    """Longest that a micro-batch, or the end of a step, may take before the run ends with the name of the rank that is
    missing and the stacks of all (minutes); 0: for ever."""


@dataclass
class ModelConfig:
    """The denoiser: a transformer with RMSNorm, rotary positions and SwiGLU, no biases."""

    objective: Literal["masked_diffusion", "autoregressive"] = "masked_diffusion"
    """What is trained: a bidirectional masked diffusion model, or the causal model it is compared with."""
    num_layers: int = 4
    """Transformer layers."""
    hidden_size: int = 256
    """Width of the residual stream."""
    num_attention_heads: int = 4
    """Attention heads (of queries)."""
    num_query_groups: int | None = None
    """Heads of keys and values (grouped-query attention); null: as many as attention heads."""
    head_dim: int | None = None
    """Width of one attention head, even; null: hidden_size / num_attention_heads."""
    ffn_hidden_size: int = 704
    """Inner width of the SwiGLU feed-forward layers."""
    qk_norm: bool = True
    """RMSNorm on every head's queries and keys."""
    norm_eps: float = 1.0e-6
    """Added to the mean square inside RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; layers that write to the residual stream take it divided by
    sqrt(2 * num_layers)."""
    tie_embeddings: bool = False
    """Use the input embedding as the output layer too."""
    attention_dropout: float = 0.0
    """Probability of dropping an attention weight."""
    hidden_dropout: float = 0.0
    """Probability of dropping an element of a layer's output."""
    vocab_size_multiple: int = 128
    """The vocabulary is padded to a multiple of this, whatever the layout."""
    transformer_config: dict[str, Any] = field(default_factory=dict)
    """Further fields of megatron-core's TransformerConfig, passed through; keys that this tree has are errors."""

    @property
    def kind(self) -> Kind:
        """What the objective is."""
        return KINDS[self.objective]

    @property
    def architecture(self) -> str:
        """Class of an export in transformers."""
        return self.kind.architectures[self.qk_norm]

    @property
    def resolved_head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def resolved_query_groups(self) -> int:
        """Heads of keys and values."""
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Rows of the embedding for a tokenizer of `vocab_size` ids ([MASK] and end-of-document included)."""
        return -(-vocab_size // self.vocab_size_multiple) * self.vocab_size_multiple


@dataclass
class DiffusionConfig:
    """The noise and the loss of masked diffusion (not used by the autoregressive objective)."""

    masking: Literal["exact_count", "bernoulli"] = "exact_count"
    """Mask an exact number of tokens of each sequence, or each token independently."""
    noise_levels: Literal["stratified_antithetic", "stratified", "antithetic", "iid"] = "stratified_antithetic"
    """How the noise levels of a global batch are drawn; iid gives the noisiest loss (examples/estimator_variance.py
    measures it)."""
    schedule: Literal["linear", "cosine", "cosine_mdlm", "polynomial", "geometric"] = "linear"
    """Mask probability as a function of the diffusion time."""
    polynomial_exponent: float = 2.0
    """The polynomial schedule: mask probability = time ** exponent."""
    sigma_min: float = 1.0e-4
    """The geometric schedule: total noise at time 0; the mask probability is 1 - exp(-noise)."""
    sigma_max: float = 20.0
    """The geometric schedule: total noise at time 1."""
    weighting: Literal["elbo", "none", "cart"] = "elbo"
    """Weights of the masked tokens' losses: elbo makes the loss the negative evidence lower bound, none is the plain
    mean over masked tokens (MaskGIT), cart weights by the visible tokens nearby (Dream). Held-out evaluation always
    uses elbo."""
    eps: float = 1.0e-3
    """Smallest diffusion time under bernoulli masking, and what cosine_mdlm leaves unmasked at time 1."""
    random_length_probability: float = 0.01
    """Probability that a training sequence is cut to a random length."""
    complementary: bool = False
    """Train on a mask and its complement as two rows of one sample, so that every token of it is predicted. A global
    batch then holds train.global_batch_size / 2 sequences; epochs and unique tokens count sequences, not rows."""


@dataclass
class AutoregressiveConfig:
    """Options of the autoregressive objective."""

    input_mask_ratio: float = 0.0
    """Probability that a training input (never a target) is replaced by [MASK]."""


@dataclass
class ParallelConfig:
    """How the work is divided over processes (one GPU or one CPU process each)."""

    tensor_model_parallel_size: int = 1
    """Processes that share every layer (TP)."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages (PP)."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks of each pipeline stage (interleaved schedule); null: not interleaved."""
    data_parallel_size: int | None = None
    """Replicas (DP); null: what the number of processes leaves, or 1 where there is no GPU."""
    sequence_parallel: bool = False
    """Divide norms and dropout over the TP group along the sequence (needs TP > 1)."""
    ddp_config: dict[str, Any] = field(default_factory=dict)
    """Further fields of megatron-core's DistributedDataParallelConfig, passed through."""

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size


@dataclass
class KernelsConfig:
    """How masking and the loss are computed."""

    implementation: Literal["auto", "triton", "torch"] = "auto"
    """auto: Triton kernels on a GPU, plain torch elsewhere. Both mask the same tokens."""
    chunk_rows: int = 4096
    """Masked tokens whose logits exist at a time; fewer need less memory."""
    fp32_logits: bool = False
    """Keep the logits of bf16 layers in fp32: a more exact gradient where predictions are confident."""
    last_layer_rows: Literal["scored", "all"] = "scored"
    """Positions at which the last layer is computed (its keys and values always are at all of them). The result is the
    same within rounding. Dropout, the autoregressive objective and Transformer Engine's layers need all."""


@dataclass
class SourceConfig:
    """One prepared corpus."""

    path: str
    """Prefix of the .bin, .idx and .json files that `megatron-dlm prepare` wrote."""
    weight: float = 1.0
    """Share of the samples that come from here, relative to the other sources."""


@dataclass
class DataConfig:
    """What is read."""

    train: list[SourceConfig] = field(default_factory=list)
    """Training corpora: a list of {path, weight}."""
    valid: list[SourceConfig] = field(default_factory=list)
    """Held-out corpora: a list of {path, weight}; empty: no evaluation."""
    tokenizer: str = ""
    """The tokenizer the corpora were prepared with: byte, a SentencePiece .model, a tokenizer.json or its folder."""
    sequence_length: int = 256
    """Tokens of one sequence."""
    unique_tokens: int | None = None
    """Use only the first so many tokens of the training corpora (tokens); null: all of them."""
    verify: Literal["auto", "always", "never"] = "auto"
    """Read whole files at the start to compare their SHA-256 with that of `prepare`; auto: those that have changed or
    were copied since, going by their time of change."""


@dataclass
class TrainConfig:
    """The length of training and the batch; give exactly one of steps and epochs."""

    steps: int | None = None
    """Optimizer steps in all."""
    epochs: float | None = None
    """Passes over the (unique) training tokens in all, instead of steps."""
    micro_batch_size: int = 4
    """Sequences that one process handles at once."""
    global_batch_size: int = 16
    """Sequences of one optimizer step, over all processes and micro-batches."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the layers; main parameters and gradient sums are fp32 in both."""
    recompute: Literal["none", "full"] = "none"
    """Recompute every layer in the backward pass, to save memory."""
    log_interval: int = 10
    """Steps between log lines; metrics.jsonl has every step."""
    max_skipped_steps: int = 10
    """Steps in a row with a non-finite gradient that are skipped before the run gives up."""


@dataclass
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1.0e-3
    """Peak learning rate."""
    min_lr: float = 1.0e-4
    """Learning rate at the end of the schedule."""
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """After the warmup: constant and at last an exponential decay (wsd), a cosine or a line to min_lr, or constant."""
    warmup_steps: int = 20
    """Steps of the linear warmup from 0."""
    decay_steps: int = 20
    """Steps of the final decay of wsd (the other schedules do not read it)."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices (not of norms)."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    optimizer_config: dict[str, Any] = field(default_factory=dict)
    """Further fields of megatron-core's OptimizerConfig, passed through."""


@dataclass
class TaskConfig:
    """Questions that a run is asked, as `megatron-dlm evaluate` does."""

    name: Literal["hellaswag", "mmlu", "arc_easy", "arc_challenge", "piqa", "lambada"]
    """The task."""
    path: str
    """Its file, or a folder that has it (see `megatron-dlm evaluate --help`)."""
    limit: int | None = None
    """Questions, the first ones; null: all."""
    masks: int | None = None
    """Masks of every answer; null: 128, and 1 where all answers are single tokens."""


@dataclass
class EvaluateConfig:
    """Held-out evaluation during training."""

    interval: int = 50
    """Steps between evaluations; there is one at the end too."""
    sequences: int = 64
    """Held-out sequences of one evaluation (all there are, if fewer)."""
    prompts: list[str] = field(default_factory=list)
    """Prompts that the model continues at every evaluation: printed, and written to samples.jsonl and TensorBoard."""
    sample_tokens: int = 64
    """New tokens of a sample, and as many forwards of the prompts as one batch."""
    tasks: list[TaskConfig] = field(default_factory=list)
    """Multiple-choice tasks of every evaluation: a list of {name, path, limit, masks}; needs data.valid."""


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    interval: int = 100
    """Steps between checkpoints; there is one at the end and on a stop signal too."""
    keep: int = 3
    """Newest checkpoints that are kept."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest checkpoint of run.directory if there is one."""
    initialize_from: str | None = None
    """Begin with the weights of this checkpoint (a run's, or an imported one) instead of random ones; only at step 0.
    A run that goes on from a checkpoint of its own does not read it."""


@dataclass
class Config:
    """Train a masked diffusion (or autoregressive) language model."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    autoregressive: AutoregressiveConfig = field(default_factory=AutoregressiveConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def rows_per_sequence(self) -> int:
        """Rows of the global batch that hold the same training sequence: 2 with complementary masks."""
        return 2 if self.diffusion.complementary and self.model.kind.complements else 1

    @property
    def last_layer_rows(self) -> bool:
        """Whether nothing in the configuration keeps the last layer from being computed at the scored tokens only."""
        dropout = self.model.attention_dropout > 0 or self.model.hidden_dropout > 0
        return self.kernels.last_layer_rows == "scored" and not dropout and not self.model.kind.causal
