"""The schema of the TOML file: a frozen class for each table; each field has its type, range, unit and meaning.

Tables and keys are named as in torchtitan. load.py reads files and overrides; planning/ computes steps and data order.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from titan_cpt.common.plugins import METRICS
from titan_cpt.config.datasets import DatasetConfig
from titan_cpt.config.model import ModelConfig
from titan_cpt.config.stages import AveragingConfig, StageConfig
from titan_cpt.config.storage import StorageConfig, UploadConfig
from titan_cpt.config.suites import SUITES
from titan_cpt.config.trackers import MlflowConfig, TrackioConfig, WandbConfig
from titan_cpt.config.types import (
    FileName,
    Fraction01,
    Name,
    NonNegativeFloat,
    OneOf,
    PositiveFloat,
    PositiveInt,
    Table,
    validation_error,
)


class JobConfig(Table):
    """[job]: name, folder and random seed of the run."""

    name: FileName
    """The run's name, and the name of its folder in output_dir."""
    description: str = ""
    """A note for people; the program does not use it."""
    output_dir: str = "outputs"
    """Folder that contains the folders of all runs, relative to the working directory."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Random seed of the initial weights and of the data order."""
    deterministic: bool = False
    """Use deterministic kernels only; training stops at an operation for which torch has none."""


class TokenizerTrainingConfig(Table):
    """[tokenizer.train]: train a byte-level BPE and write it to tokenizer.path if that file is missing."""

    dataset: Name
    """Dataset whose `source` text the BPE is trained on; usually that of the first stage."""
    vocab_size: Annotated[int, Field(ge=257, le=2**24)]
    """Vocabulary size of the BPE, including the end-of-document token."""


class TokenizerExtendConfig(Table):
    """[tokenizer.extend]: path is the tokenizer `base` with further tokens; the ids of base keep their meaning."""

    base: str
    """The tokenizer.json that is extended. Weights and token files that were made with it can be used as they are."""
    dataset: Name | None = None
    """Dataset on whose `source` text the merges of base are continued, if the file tokenizer.path is missing. Unset:
    the file must exist."""
    add: Annotated[int, Field(ge=1, le=2**24)] | None = None
    """Number of tokens to add, if the file tokenizer.path is missing. Unset: the file must exist."""

    @model_validator(mode="after")
    def _both_or_neither(self) -> TokenizerExtendConfig:
        if (self.dataset is None) != (self.add is None):
            given, missing = ("add", "dataset") if self.dataset is None else ("dataset", "add")
            raise validation_error(
                f"{given} needs {missing}: both make the extended tokenizer; leave out both if its file exists"
            )
        return self


class TokenizerConfig(Table):
    """[tokenizer]: the tokenizer of all datasets."""

    path: str = "bytes"
    """Path of a Hugging Face tokenizer.json, or "bytes": 256 byte values and an end-of-document token."""
    add_bos: bool = False
    """Begin every document with the tokenizer's begin-of-document token (BOS), as the post-processors of Llama's and
    Gemma's tokenizers do. `prepare` adds it, data prepared without it is refused, and `eval` and `generate` put it
    before every prompt."""
    allow_mismatch: bool = False
    """Allow stages to start from weights that were trained with another tokenizer (`init` = hf: or checkpoint:).
    Otherwise such a config is refused, because the same ids mean other tokens."""
    train: TokenizerTrainingConfig | None = None
    """How to train the tokenizer if the file `path` is missing."""
    extend: TokenizerExtendConfig | None = None
    """The tokenizer that `path` extends, and how to make `path` if that file is missing. Unset: it extends none."""

    @model_validator(mode="after")
    def _extends_a_file(self) -> TokenizerConfig:
        if self.extend is None:
            return self
        if self.train is not None:
            raise validation_error("train and extend exclude each other: a tokenizer is trained, or extends another")
        if "bytes" in (self.path, self.extend.base):
            where = "path" if self.path == "bytes" else "extend.base"
            raise validation_error(f'{where} = "bytes" has no merges to continue; name a tokenizer.json')
        if self.path == self.extend.base:
            raise validation_error(f"path and extend.base are the same file, {self.path!r}; name another path")
        return self


class OptimizerConfig(Table):
    """[optimizer]: AdamW hyperparameters, or those of Muon; the learning rate is set per stage."""

    name: Literal["AdamW", "Muon"] = "AdamW"
    """AdamW for all parameters; or Muon for the two-dimensional weights of the blocks and AdamW, with the same learning
    rate, for embedding, head, norms and biases. Muon was not run on a GPU yet."""
    implementation: Literal["fused", "triton"] = "fused"
    """Kernel of the update: torch's fused AdamW, or one Triton launch (CUDA only) that also clips the gradients and
    writes the bf16 compute copy. A checkpoint saved under one resumes under the other; results differ in the last bits.
    triton was not run on a GPU yet."""
    momentum: Fraction01 = 0.95
    """Muon: decay rate of the momentum buffer."""
    nesterov: bool = True
    """Muon: use Nesterov momentum."""
    ns_steps: Annotated[int, Field(ge=1, lt=100)] = 5
    """Muon: Newton-Schulz iterations that orthogonalize an update."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Muon: factor of the learning rate for a matrix of A rows and B columns. match_rms_adamw: 0.2 sqrt(max(A, B)),
    which makes updates as large as AdamW's, so that one learning rate fits both; original: sqrt(max(1, A / B))."""
    beta1: Fraction01 = 0.9
    """Decay rate of the first moment."""
    beta2: Fraction01 = 0.95
    """Decay rate of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices, with both optimizers; norms and biases are not decayed."""


class TrainingConfig(Table):
    """[training]: batch size, sequence length, mixed precision, gradient clipping, and responses to bad steps."""

    global_batch_size: PositiveInt
    """Sequences per optimizer step, over all ranks."""
    local_batch_size: PositiveInt
    """Sequences per micro-batch of one data-parallel rank. Gradient accumulation follows: global_batch_size /
    (local_batch_size x data-parallel degree) micro-batches per step."""
    seq_len: Annotated[int, Field(ge=2)]
    """Sequence length in tokens."""
    document_mask: bool = False
    """Attention stays within a document, which the tokenizer's end-of-document token ends; otherwise it crosses the
    borders of the documents in a sequence. Sequences and targets are the same."""
    document_positions: bool = False
    """Rotary positions (RoPE) begin at 0 in each document, otherwise in each sequence."""
    max_norm: PositiveFloat = 1.0
    """Gradient clipping: gradients are scaled down to this global L2 norm."""
    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype (mixed precision). Master weights and optimizer state stay in float32. bfloat16 is slow on CPUs
    that do not support it."""
    enable_onednn: bool = False
    """On an AMD CPU with AVX-512, multiply float32 matrices with oneDNN, which is about twice as fast there as MKL,
    torch's default. Sums are in another order, so that losses differ in their last digits. No effect on other devices
    and with torch.compile."""
    mixed_precision_reduce: Literal["float32"] = "float32"
    """Dtype in which gradients are summed over ranks."""
    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in CPU memory (FSDP2 CPU offload)."""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Data-loader worker processes, which load batches ahead; 0 loads in the training process."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """Response to a non-finite loss or gradient, which is never applied to the weights: stop; skip the batch; or roll
    back to the last checkpoint and skip the batch when training reaches it again."""
    on_loss_spike: Literal["log", "stop", "skip", "rollback"] = "log"
    """Response to a loss spike; "log" records it and continues."""
    loss_spike_z_score: PositiveFloat = 8.0
    """A loss that is this many standard deviations above the mean of the last loss_spike_window steps is a spike."""
    loss_spike_window: Annotated[int, Field(ge=0, le=100_000)] = 100
    """Steps over which that mean is taken, within one stage. No spike is detected before the window is full; 0 turns
    the detection off."""
    max_skips_per_1000_steps: Annotated[int, Field(ge=0, le=1000)] = 10
    """Skipped batches allowed in any 1000 steps of a stage; one more stops the run."""
    attention_backend: Literal["default", "cudnn", "flash", "flex", "efficient", "math", "fastest"] = "default"
    """Kernel of scaled dot-product attention (SDPA). default: torch chooses; fastest: measure the available ones when
    the run begins, and use the fastest one for each sequence length; a resumed run uses these too. With document_mask
    on a GPU, flash is the flash kernel for several lengths, flex is FlexAttention, and default the first that works;
    cudnn, efficient and math compute all pairs of tokens. Only default without a document mask was run on a GPU yet."""
    cuda_graphs: bool = False
    """Replay CUDA graphs of a micro-batch and of the optimizer step, instead of launching every kernel from Python.
    Single process and CUDA only; not run on a GPU yet."""
    gc_freq: PositiveInt = 50
    """Steps between Python garbage collections, which all ranks run after the same step."""


class ParallelismConfig(Table):
    """[parallelism]: parallelism degrees (data, tensor, pipeline, context) and their options."""

    data_parallel_replicate_degree: PositiveInt = 1
    """Data-parallel replicas of the sharded model (HSDP)."""
    data_parallel_shard_degree: PositiveInt | None = None
    """Data-parallel ranks over which FSDP2 shards parameters, gradients and optimizer state. Unset: all ranks that the
    other degrees do not use."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Whether FSDP2 frees gathered parameters after the forward pass and gathers them again for the backward pass.
    "default" is "always", and "never" with pipeline parallelism."""
    tensor_parallel_degree: PositiveInt = 1
    """Tensor-parallel degree: ranks over which each matrix is split."""
    enable_async_tensor_parallel: bool = False
    """Async tensor parallelism: overlap tensor-parallel communication with matrix products (CUDA)."""
    disable_loss_parallel: bool = False
    """Gather the logits before the loss; otherwise each tensor-parallel rank computes the loss on its vocabulary shard
    (loss parallel)."""
    pipeline_parallel_degree: PositiveInt = 1
    """Pipeline-parallel degree: ranks over which the layers are split."""
    pipeline_parallel_schedule: str = "1F1B"
    """Pipeline schedule: GPipe, 1F1B, LoopedBFS, Interleaved1F1B, InterleavedZeroBubble, ZBVZeroBubble or DualPipeV of
    torch.distributed.pipelining."""
    pipeline_parallel_microbatch_size: PositiveInt = 1
    """Sequences per pipeline micro-batch."""
    context_parallel_degree: PositiveInt = 1
    """Context-parallel degree: ranks over which each sequence is split."""
    context_parallel_method: Literal["gather", "ring"] = "gather"
    """How attention gets the keys and values of other context-parallel ranks: all-gather, or torch's ring attention
    (CUDA)."""


class CheckpointConfig(Table):
    """[checkpoint]: when checkpoints are saved, and which of them are kept."""

    interval: PositiveInt = 500
    """Checkpoint interval in steps. The end of a stage and its pre-anneal point are saved too."""
    keep_latest_k: PositiveInt = 2
    """Number of newest interval checkpoints to keep. Stage ends and pre-anneal points are always kept."""
    keep_every: PositiveInt | None = None
    """Interval checkpoints at a multiple of this step of the stage are never deleted; a multiple of interval. Unset:
    none."""
    async_mode: Literal["async", "disabled"] = "async"
    """Asynchronous checkpointing: write in the background while training continues; or "disabled": training waits."""
    upload: UploadConfig | None = None
    """Upload finished checkpoints to object storage. Unset: none."""

    @model_validator(mode="after")
    def _kept_checkpoints_are_saved(self) -> CheckpointConfig:
        if self.keep_every is not None and self.keep_every % self.interval:
            raise validation_error(
                f"keep_every must be a multiple of interval ({self.interval}), got {self.keep_every}"
            )
        return self


class CommConfig(Table):
    """[comm]: timeouts of collective operations, after which a hang is a failure."""

    init_timeout_seconds: PositiveInt = 600
    """Timeout until every rank has finished its first step: waiting for all processes to start, loading, compiling."""
    train_timeout_seconds: PositiveInt = 1800
    """Timeout of a collective operation after the first step. It must exceed the duration of the slowest checkpoint
    save, during which the other ranks wait."""


class ActivationCheckpointConfig(Table):
    """[activation_checkpoint]: activation checkpointing, which recomputes activations in the backward pass."""

    mode: Literal["none", "full", "selective", "memory_budget"] = "none"
    """none: keep all activations; full: recompute whole blocks; selective: recompute a selection (selective_ac_option);
    memory_budget: torch.compile chooses what to recompute within memory_budget."""
    selective_ac_option: str = "op"
    """"op": keep attention and every second matrix product, recompute the rest; or an integer n: recompute every n-th
    block."""
    memory_budget: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Fraction of the activation memory to keep in mode "memory_budget"."""


class CompileConfig(Table):
    """[compile]: torch.compile."""

    enable: bool = False
    """Compile the model with torch.compile."""
    scope: Literal["block", "model"] = "block"
    """block: compile each transformer block; all blocks share the code. model: compile embedding, blocks and final norm
    as one graph, which also fuses operations of neighboring blocks and takes longer to compile; single process only.
    Not run on a GPU yet."""
    mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """`mode` of torch.compile. max-autotune-no-cudagraphs chooses kernels by measuring them at the start of every
    session: a resumed run may choose others, whose results differ in the last bits. Not run on a GPU yet."""


class Float8Config(Table):
    """[float8]: matrix products in float8, through torchao."""

    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """Float8 scaling recipe of torchao. Unset: no float8."""
    enable_fsdp_float8_all_gather: bool = False
    """All-gather FSDP2 parameters in float8 (recipe tensorwise)."""
    filter_fqns: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Linear layers of the blocks whose fully qualified name contains one of these strings stay in the compute dtype.
    The output head always does. The entry "auto_filter_small_kn" excludes layers that are too small to gain."""


class MetricsConfig(Table):
    """[metrics]: logging."""

    log_freq: PositiveInt = 10
    """Logging interval in steps, at which metrics are read from the device; metrics.jsonl has a line for every step."""
    enable_tensorboard: bool = True
    """Write TensorBoard events to tb/ in the run's folder: curves over steps and the config as text. The subfolder
    over_tokens has losses, LR and forgetting with tokens as x axis (tags train_over_tokens/..., and so on)."""
    wandb: WandbConfig | None = None
    """Send the metrics to Weights & Biases. Unset: off; {} for the defaults."""
    mlflow: MlflowConfig | None = None
    """Send the metrics to MLflow. Unset: off; {} for the defaults."""
    trackio: TrackioConfig | None = None
    """Send the metrics to trackio. Unset: off; {} for the defaults."""
    tracker_timeout_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    """How long a run waits at its end for its trackers to receive the last metrics; `titan-cpt track` sends what is
    missing. After a stop signal at most 5 seconds. During training nothing waits for a tracker."""


class ProfilingConfig(Table):
    """[profiling]: torch.profiler traces, `<run>/profile/<stage>-step-<8 digits>/rank-<5 digits>.json.gz`."""

    enable_profiling: bool = False
    """Record traces."""
    profile_freq: PositiveInt = 100
    """Steps from one trace to the next; a trace covers one step."""


class ValidationConfig(Table):
    """[validation]: when and on how much data the validation loss of every dataset is computed."""

    interval: PositiveInt = 100
    """Validation interval in steps. Step 0 and the end of every stage are validated too."""
    sequences: PositiveInt = 64
    """Sequences per dataset, evenly spaced over its validation tokens and the same ones every time."""
    local_batch_size: PositiveInt | None = None
    """Sequences per forward pass of one rank. Unset: training.local_batch_size."""
    final_window_steps: Annotated[int, Field(ge=0)] = 0
    """Final loss of a stage as in Ibrahim et al. 2024: the mean of the validation losses in the last final_window_steps
    steps (100 in the paper); 0: off."""
    final_window_every: PositiveInt = 10
    """Steps between the validations that are averaged in the final loss."""
    metrics: Annotated[tuple[Annotated[str, OneOf((), METRICS)], ...], Field(strict=False)] = ()
    """Metrics of other packages (titan_cpt.metrics) that are computed at every validation."""


class EvaluationConfig(Table):
    """[evaluation]: zero-shot and few-shot benchmarks during training (lm-evaluation-harness)."""

    suite: str | None = None
    """Benchmark suite, which fixes tasks, few-shot examples and metrics: paper_english, paper_german, in_context,
    minimal_pairs or offline. Unset: no benchmarks."""
    every: PositiveInt | None = None
    """Evaluation interval in steps of a stage; each evaluation saves a checkpoint. Unset: at stage ends only."""
    at_stage_end: bool = True
    """Evaluate at the end of every stage."""
    tasks_dir: str | None = None
    """Folder of additional tasks: YAML files of lm-evaluation-harness. Unset: none."""
    limit: PositiveInt | None = None
    """Number of samples per task, evenly spaced. Unset: all samples."""

    @model_validator(mode="after")
    def _suite_is_known(self) -> EvaluationConfig:
        if self.suite is not None and self.suite not in SUITES:
            raise validation_error(f"suite must be one of {', '.join(SUITES)}, got {self.suite!r}")
        if self.suite is None and self.every is not None:
            raise validation_error("every needs a suite; set evaluation.suite")
        return self


class Config(Table):
    """The whole TOML file."""

    job: JobConfig
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    datasets: Annotated[dict[Name, DatasetConfig], Field(min_length=1)]
    optimizer: OptimizerConfig = OptimizerConfig()
    averaging: AveragingConfig | None = None
    training: TrainingConfig
    parallelism: ParallelismConfig = ParallelismConfig()
    comm: CommConfig = CommConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    storage: StorageConfig = StorageConfig()
    activation_checkpoint: ActivationCheckpointConfig = ActivationCheckpointConfig()
    compile: CompileConfig = CompileConfig()
    float8: Float8Config = Float8Config()
    metrics: MetricsConfig = MetricsConfig()
    profiling: ProfilingConfig = ProfilingConfig()
    validation: ValidationConfig = ValidationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sweep: dict[str, Any] = Field(default_factory=dict)
    """[sweep]: dotted keys and lists of values. `titan-cpt sweep` trains a sweep run for every combination of values;
    the lists in [sweep.zip] have equal length and are combined item by item instead; [sweep.fit] is below."""
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1, strict=False)]


def document_keys(config: Config, *names: str) -> list[str]:
    """The keys of these names that are true, of [training] and of stages, dotted."""
    tables = {"training": config.training, **{f"stages.{stage.name}": stage for stage in config.stages}}
    return [f"{table}.{name}" for table, keys in tables.items() for name in names if getattr(keys, name)]
