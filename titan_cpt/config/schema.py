"""The schema of the TOML file: one frozen model per table, every key with its unit and range below it.

Nothing is worked out here: what follows from these numbers (steps from tokens, accumulation, cursors) is the plan's,
reading files and overrides is config_file's. Section and key names follow torchtitan's TOML.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from titan_cpt.config.datasets import DatasetConfig
from titan_cpt.config.lr import LR
from titan_cpt.config.model import ModelConfig
from titan_cpt.config.suites import SUITES
from titan_cpt.config.types import (
    FileName,
    Fraction01,
    Mix,
    Name,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Table,
    Tokens,
    fault,
)


class JobConfig(Table):
    """[job]: which run this is."""

    name: FileName
    """The run's name, and its folder below output_dir."""
    description: str = ""
    """A line for people; nothing reads it."""
    output_dir: str = "outputs"
    """The folder that holds the folders of runs, relative to the working directory."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds the initial weights and the order of the data."""
    deterministic: bool = False
    """Ask torch for deterministic kernels, and stop where it has none."""


class TokenizerTrainingConfig(Table):
    """[tokenizer.train]: make tokenizer.path from a dataset's text when it is not there yet."""

    dataset: Name
    """The dataset whose `source` text the BPE is trained on: the first one, as the Pile's was."""
    vocab_size: Annotated[int, Field(ge=257, le=2**24)]
    """Entries of the byte-level BPE, the end-of-document token included."""


class TokenizerConfig(Table):
    """[tokenizer]: what turns text into ids and ids into bytes."""

    path: str = "bytes"
    """A tokenizer.json, or "bytes": 256 byte values and an end-of-document id."""
    add_bos: bool = False
    """Begin every document with the tokenizer's begin-of-document token (BOS), as the post-processors of Llama's and
    Gemma's tokenizers do. `prepare` adds it, data prepared otherwise is refused, and `eval` and `generate` then put it
    before every text."""
    allow_mismatch: bool = False
    """Begin stages with weights that were trained with another tokenizer (`init` = hf:, checkpoint:), which is refused
    otherwise: the ids that they know mean other tokens."""
    train: TokenizerTrainingConfig | None = None
    """How to make the file at `path` when it is missing."""


class OptimizerConfig(Table):
    """[optimizer]: AdamW's numbers; the learning rate belongs to the stages."""

    name: Literal["AdamW"] = "AdamW"
    """The only optimizer."""
    beta1: Fraction01 = 0.9
    """Decay of the first moment."""
    beta2: Fraction01 = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of matrices; norms and biases have none."""


class StageOptimizerConfig(Table):
    """[stages.optimizer]: numbers of [optimizer] that this stage sets anew."""

    beta1: Fraction01 | None = None
    """In place of optimizer.beta1."""
    beta2: Fraction01 | None = None
    """In place of optimizer.beta2."""
    eps: PositiveFloat | None = None
    """In place of optimizer.eps."""
    weight_decay: NonNegativeFloat | None = None
    """In place of optimizer.weight_decay."""


class TrainingConfig(Table):
    """[training]: the batch and the arithmetic."""

    global_batch_size: PositiveInt
    """Sequences of one optimizer step, over all ranks."""
    local_batch_size: PositiveInt
    """Sequences of one micro-batch of one data-parallel rank; accumulation follows from global_batch_size."""
    seq_len: Annotated[int, Field(ge=2)]
    """Tokens of one sequence."""
    max_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this global L2 norm."""
    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """What matrices are multiplied in; weights and moments stay float32. Without bfloat16 a CPU is slower in it."""
    mixed_precision_reduce: Literal["float32"] = "float32"
    """What gradients are summed in over ranks."""
    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory."""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that read batches ahead; 0 reads in the training process."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """What is done about a loss or gradient that is not finite, which never reaches the weights: stop; pass over the
    batch; or go back to the last checkpoint, and pass over it from there."""
    on_loss_spike: Literal["log", "stop", "skip", "rollback"] = "log"
    """The same for a loss far above those before it; "log" tells of it and trains on."""
    loss_spike_z_score: PositiveFloat = 8.0
    """A loss so many standard deviations above the mean of the window before it is a spike."""
    loss_spike_window: Annotated[int, Field(ge=0, le=100_000)] = 100
    """Steps of the window, inside one stage; there is no spike before it is full, and none at all with 0."""
    max_skips_per_1000_steps: Annotated[int, Field(ge=0, le=1000)] = 10
    """Batches that are passed over in any 1000 steps of a stage; at the next one the run stops."""
    gc_freq: PositiveInt = 50
    """Steps between Python garbage collections, so that ranks do not stop at different times."""


class ParallelismConfig(Table):
    """[parallelism]: how the model is laid over the ranks."""

    data_parallel_replicate_degree: PositiveInt = 1
    """Copies of the sharded model (HSDP)."""
    data_parallel_shard_degree: PositiveInt | None = None
    """Ranks over which FSDP2 shards; left out, all ranks that the other degrees leave."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Whether parameters are gathered again for the backward pass; "default" is always, but for pipelines."""
    tensor_parallel_degree: PositiveInt = 1
    """Ranks over which matrices are split."""
    enable_async_tensor_parallel: bool = False
    """Overlap tensor-parallel communication with matrix products (CUDA)."""
    disable_loss_parallel: bool = False
    """Gather the logits before the loss."""
    pipeline_parallel_degree: PositiveInt = 1
    """Ranks over which layers are split."""
    pipeline_parallel_schedule: str = "1F1B"
    """A schedule of torch.distributed.pipelining."""
    pipeline_parallel_microbatch_size: PositiveInt = 1
    """Sequences of one pipeline micro-batch."""
    context_parallel_degree: PositiveInt = 1
    """Ranks over which a sequence is split."""
    context_parallel_method: Literal["gather", "ring"] = "gather"
    """Keys and values are gathered from the other ranks, or pass round them (torch's ring attention, CUDA)."""


class CheckpointConfig(Table):
    """[checkpoint]: what is saved and kept."""

    interval: PositiveInt = 500
    """Steps between checkpoints; a stage's end and its pre-anneal point are saved besides."""
    keep_latest_k: PositiveInt = 2
    """Newest interval checkpoints kept; stage ends and pre-anneal points are always kept."""
    keep_every: PositiveInt | None = None
    """Interval checkpoints at a multiple of so many steps of the stage are kept for good; a multiple of interval."""
    async_mode: Literal["async", "disabled"] = "async"
    """Write while training goes on, or stop for it."""

    @model_validator(mode="after")
    def _kept_ones_are_saved(self) -> CheckpointConfig:
        if self.keep_every is not None and self.keep_every % self.interval:
            raise fault(f"keep_every must be a multiple of interval ({self.interval}), got {self.keep_every}")
        return self


class CommConfig(Table):
    """[comm]: how long processes wait for each other before a hang counts as a failure."""

    init_timeout_seconds: PositiveInt = 600
    """Longest wait for the other nodes and processes to start, and for any of them until each has done its first step
    (loading, compiling)."""
    train_timeout_seconds: PositiveInt = 1800
    """Longest wait for another process in one collective operation after the first step; longer than the slowest save,
    for which the others wait."""


class ActivationCheckpointConfig(Table):
    """[activation_checkpoint]: what is computed again in the backward pass."""

    mode: Literal["none", "full", "selective", "memory_budget"] = "none"
    """Nothing, whole blocks, a selection, or what torch.compile chooses under a budget."""
    selective_ac_option: str = "op"
    """"op", or an integer n for every n-th block."""
    memory_budget: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the activations kept under mode "memory_budget"."""


class CompileConfig(Table):
    """[compile]: torch.compile, block by block."""

    enable: bool = False
    """Compile each block."""


class Float8Config(Table):
    """[float8]: matrix products in 8 bits through torchao."""

    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """torchao's scaling recipe; left out, no float8."""
    enable_fsdp_float8_all_gather: bool = False
    """Gather parameters in float8."""
    filter_fqns: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Linear layers of the blocks whose name holds one of these stay in higher precision, as the head does anyway."""


class MetricsConfig(Table):
    """[metrics]: what is shown and written."""

    log_freq: PositiveInt = 10
    """Steps between readings of the device's numbers."""
    enable_tensorboard: bool = True
    """Write TensorBoard events into the run's folder."""


class ProfilingConfig(Table):
    """[profiling]: traces of torch.profiler, `<run>/profile/<stage>-step-<8 digits>/rank-<5 digits>.json.gz`."""

    enable_profiling: bool = False
    """Record traces."""
    profile_freq: PositiveInt = 100
    """Steps from one trace to the next; a trace holds one step."""


class ValidationConfig(Table):
    """[validation]: what every dataset's loss is measured on, and when."""

    interval: PositiveInt = 100
    """Steps between measurements; step 0 and the end of every stage are measured besides."""
    sequences: PositiveInt = 64
    """Windows of each dataset, evenly spread over its validation tokens and the same ones every time."""
    local_batch_size: PositiveInt | None = None
    """Sequences of one forward pass of one rank; left out, training.local_batch_size."""
    final_window_steps: Annotated[int, Field(ge=0)] = 0
    """The paper's final loss: the mean over the last so many steps of a stage (100 in the paper); 0 is off."""
    final_window_every: PositiveInt = 10
    """Steps between the samples of that mean."""


class EvaluationConfig(Table):
    """[evaluation]: benchmarks inside training."""

    suite: str | None = None
    """paper_english, paper_german, minimal_pairs or offline; left out, nothing is evaluated."""
    every: PositiveInt | None = None
    """Steps of a stage between evaluations; a checkpoint is saved for each."""
    at_stage_end: bool = True
    """Evaluate when a stage ends."""
    tasks_dir: str | None = None
    """Folder of more tasks, as YAML files of lm-evaluation-harness."""
    limit: PositiveInt | None = None
    """Only so many samples of each task, evenly spread."""

    @model_validator(mode="after")
    def _suite_is_known(self) -> EvaluationConfig:
        if self.suite is not None and self.suite not in SUITES:
            raise fault(f"suite must be one of {', '.join(SUITES)}, got {self.suite!r}")
        if self.suite is None and self.every is not None:
            raise fault("every needs a suite; give evaluation.suite")
        return self


class ReplayConfig(Table):
    """[stages.replay]: old sequences in the place of new ones; the stage's budget stays the same."""

    fraction: Fraction01
    """Share of the stage's sequences that are replayed; 0.05 is the usual choice, 0.01 for a weak shift."""
    from_: Annotated[Mix | None, Field(alias="from")] = None
    """Datasets, or a table of weights; left out, every earlier one, by the tokens of it trained on so far."""
    order: Literal["as_trained", "reshuffled"] = "as_trained"
    """The order of first sight, or a new permutation of what was seen."""
    on_exhausted: Literal["error", "repeat"] = "error"
    """What the plan does where a dataset has fewer seen sequences than the replay would take."""


class StageConfig(Table):
    """[[stages]]: one leg of the run."""

    name: Name
    """The stage's name, its folder, and how overrides and `init` refer to it."""
    dataset: Mix
    """A dataset, or a table of datasets to weights."""
    steps: PositiveInt | None = None
    """Optimizer steps; or give tokens."""
    tokens: Tokens | None = None
    """Token budget, rounded up to whole steps; or give steps."""
    init: str | None = None
    """Where the weights come from: previous, random, stage:NAME, stage:NAME@pre_anneal, checkpoint:PATH, hf:NAME;
    left out, random for the first stage and previous for the others."""
    optimizer_state: Literal["reset", "keep"] = "reset"
    """Whether AdamW's moments and step count come along with the weights."""
    optimizer: StageOptimizerConfig | None = None
    """Numbers of [optimizer] that change here."""
    lr: LR
    """The learning-rate schedule."""
    replay: ReplayConfig | None = None
    """Old data in the mix."""


class Config(Table):
    """The whole file."""

    job: JobConfig
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    datasets: Annotated[dict[Name, DatasetConfig], Field(min_length=1)]
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    parallelism: ParallelismConfig = ParallelismConfig()
    comm: CommConfig = CommConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    activation_checkpoint: ActivationCheckpointConfig = ActivationCheckpointConfig()
    compile: CompileConfig = CompileConfig()
    float8: Float8Config = Float8Config()
    metrics: MetricsConfig = MetricsConfig()
    profiling: ProfilingConfig = ProfilingConfig()
    validation: ValidationConfig = ValidationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sweep: dict[str, Any] = Field(default_factory=dict)
    """[sweep]: dotted keys to lists of values, which are crossed; those in [sweep.zip] go in step. `titan-cpt sweep`
    trains an arm for each choice."""
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1, strict=False)]
