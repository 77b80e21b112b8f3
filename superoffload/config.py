"""Every setting of a run, validated on construction.

This file is the only place that holds a setting's name, type, default, range and help; `cli.py` derives the command
line from these fields. The field `max_grad_norm` is the flag `--max_grad_norm`.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

from superoffload.errors import UserError
from superoffload.setting import Settings, setting, settings_of, several, shown

DECAY = 0.1


def parse_columns(text: str | None) -> dict[str, str]:
    """Parse `part=column,part=column`; raise `UserError` if it has any other form."""
    result: dict[str, str] = {}
    for item in text.split(",") if text else ():
        part, equals, column = (word.strip() for word in item.partition("="))
        if not (part and equals and column) or part in result:
            raise UserError(f"--columns {text}: must be of the form prompt=question,completion=answer")
        result[part] = column
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings(Settings):
    """Model."""

    model_name: str = setting("Hub id or folder of the model.", shapes_run=True, path=True)
    revision: str | None = setting("Branch, tag or commit of the model on the hub.", None, shapes_run=True)
    trust_remote_code: bool = setting("Run code that the model brings along; read it first.", False)
    init_missing: bool = setting(
        "Train weights that the model's files lack from random values, instead of refusing the model.", False
    )
    resize_embeddings: bool = setting(
        "Add rows to the embedding and the output layer, up to a multiple of 64, if the tokenizer has more tokens than "
        "they have rows; new rows start as the mean of the others.",
        False,
        shapes_run=True,
    )
    attn_implementation: str = setting(
        "Attention kernel; auto uses flash_attention_2 if it can run; else, for packs on CUDA, torch's varlen_attn if "
        "it gives the numbers of sdpa; else sdpa (one document at a time in packs).",
        "auto",
        choices=("auto", "eager", "sdpa", "flash_attention_2"),
    )
    kernels: str = setting(
        "Kernels for norms, SwiGLU and rotary embeddings: none uses the model's own; liger those of the package "
        "liger-kernel, on CUDA; compiled those that torch.compile makes; auto uses liger if it is installed and gives "
        "the model's own numbers.",
        "auto",
        choices=("auto", "none", "liger", "compiled"),
    )
    leaf_module: str | None = setting(
        "Class name of the module that ZeRO-3 fetches as a whole (a sparse MoE block); detected by default.", None
    )
    freeze: tuple[str, ...] = setting(
        "Do not train the parameters in whose name one of these regular expressions is found, "
        r"e.g. embed_tokens 'layers\.[0-7]\.'.",
        (),
        several=True,
        shapes_run=True,
    )
    activation_checkpointing: str = setting(
        "Recompute activations in backward, to save device memory. full, which the flag alone means, keeps the input "
        "of each layer on the device; offload keeps it on the host.",
        "none",
        choices=("none", "full", "offload"),
        alone="full",
    )
    tiled_mlp: int | Literal["auto"] = setting(
        "Run the MLP of each layer in this many tiles over the tokens, in forward and again in backward, so that its "
        "activations exist for one tile at a time; 0: untiled; auto: so many that a tile has at most as many tokens as "
        "the model is wide, if a test at the start finds an MLP that works token by token. A run may be resumed with "
        "another number, but then rounds differently.",
        0,
        minimum=0,
    )
    loss_kernel: str = setting(
        "How to compute the loss: chunked never holds all logits; plain does; auto uses chunked if a test at the start "
        "finds the model's own losses. A run may be resumed with another kernel, but then rounds differently.",
        "auto",
        choices=("auto", "chunked", "plain"),
    )

    def __post_init__(self) -> None:
        """Check each value, and that the patterns are regular expressions."""
        Settings.__post_init__(self)
        for pattern in self.freeze:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"--freeze {pattern}: is not a regular expression ({error})") from error

    @property
    def recomputes(self) -> bool:
        """Return whether layers are computed a second time, in backward."""
        return self.activation_checkpointing != "none"

    @property
    def origin(self) -> tuple[str, str | None, bool]:
        """Return what loads a part of the model: its name, its revision, and whether its code may run."""
        return self.model_name, self.revision, self.trust_remote_code


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings(Settings):
    """Data."""

    dataset_name: tuple[str, ...] = setting(
        "Hub id (with @REVISION for a branch, tag or commit), folder, or .json/.jsonl/.parquet/.csv/.tsv/.arrow file "
        "(JSON and CSV may be compressed), or several. NAME:0.3 takes a share of the rows, NAME#500 a number of rows, "
        "drawn with --seed.",
        ("tatsu-lab/alpaca",),
        several=True,
        shapes_run=True,
        path=True,
    )
    dataset_weights: tuple[float, ...] = setting(
        "One weight per data set: in each epoch, rows are drawn in these proportions, with replacement.",
        (),
        several=True,
        above=0,
        shapes_run=True,
    )
    dataset_config: str | None = setting(
        "Config of a hub data set or a folder that has several.", None, shapes_run=True
    )
    dataset_split: str = setting(
        "Split of a hub data set or a folder, or a part of it, e.g. train[:1000]. A file is one split of any name.",
        "train",
        shapes_run=True,
    )
    dataset_format: str = setting(
        "Format of the rows; auto detects it from the columns.",
        "auto",
        choices=("auto", "alpaca", "messages", "prompt_completion", "text"),
        shapes_run=True,
    )
    columns: str | None = setting(
        "Column names, if they differ from the format's, e.g. prompt=question,completion=answer.", None, shapes_run=True
    )
    chat_template: str = setting(
        "auto, tokenizer (the tokenizer's own template), plain, the name of one of the tokenizer's templates, or a "
        "file: a Jinja template, or a tokenizer_config.json. auto uses the Alpaca template for pairs of prompt and "
        "answer, and the tokenizer's template for chats, or plain if it has none.",
        "auto",
        shapes_run=True,
        path=True,
    )
    dataset_percentage: float = setting(
        "Percentage of the rows to use, starting with the first.", 100.0, above=0, maximum=100, shapes_run=True
    )
    shuffle_rows: bool = setting("Draw the rows of --dataset_percentage with --seed.", False, shapes_run=True)
    max_length: int = setting("Maximum tokens per row or pack.", 2048, minimum=8, shapes_run=True)
    long_rows: str = setting(
        "What to do with rows longer than --max_length: truncate keeps their first tokens, split makes several rows of "
        "them and loses no target, drop leaves them out.",
        "truncate",
        choices=("truncate", "split", "drop"),
        shapes_run=True,
    )
    train_on_prompt: bool = setting("Train on the tokens of the prompt too.", False, shapes_run=True)
    packing: bool = setting(
        "Pack rows into sequences of up to --max_length tokens; attention never crosses rows.",
        True,
        shapes_run=True,
    )
    padding: str = setting(
        "Pad unpacked rows to the longest in the batch, or to --max_length, which disables packing.",
        "longest",
        choices=("longest", "max_length"),
        shapes_run=True,
    )
    skip_bad_rows: bool = setting(
        "Skip malformed rows and report their number, instead of stopping at the first.", False, shapes_run=True
    )
    drop_unrendered: bool = setting(
        "Leave out fields that the chat template does not write (reasoning, tool calls, tools, ...) and report their "
        "number, instead of stopping at the first.",
        False,
        shapes_run=True,
    )
    keep_empty_answers: bool = setting(
        "Train on empty answers, which teach the model to say nothing.", False, shapes_run=True
    )
    num_proc: int = setting("Number of processes that tokenise on each machine.", 1, minimum=1)
    eval_percentage: float = setting(
        "Percentage of the rows to hold out for evaluation; 0: none.", 0.0, minimum=0, maximum=50, shapes_run=True
    )
    eval_dataset: str | None = setting("Data set to evaluate on: hub id, folder or file.", None, path=True)
    eval_config: str | None = setting("Config of --eval_dataset, as --dataset_config.", None)
    eval_split: str = setting("Split of --eval_dataset, as --dataset_split.", "test")

    def __post_init__(self) -> None:
        """Check each value, and that no two contradict each other."""
        Settings.__post_init__(self)
        parse_columns(self.columns)
        if self.dataset_weights and len(self.dataset_weights) != len(self.dataset_name):
            raise UserError(
                f"--dataset_weights {shown(self.dataset_weights)}: --dataset_name has {len(self.dataset_name)} values; "
                "give one weight for each"
            )
        if self.eval_config is not None and self.eval_dataset is None:
            raise UserError(f"--eval_config {self.eval_config}: there is no --eval_dataset that it belongs to")
        if self.eval_dataset is not None and self.eval_percentage:
            raise UserError(
                f"--eval_dataset {self.eval_dataset} and --eval_percentage {self.eval_percentage:g} both choose the "
                "held-out rows; use only one"
            )

    @property
    def packs(self) -> bool:
        """Return whether rows are packed: --padding max_length turns packing off."""
        return self.packing and self.padding == "longest"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings(Settings):
    """Training."""

    lr: float = setting("Peak learning rate.", 1e-5, above=0, maximum=10, shapes_run=True)
    batch_size: int = setting("Rows (packs, if packed) per device and micro-batch.", 1, minimum=1, shapes_run=True)
    gradient_accumulation_steps: int = setting(
        "Micro-batches per optimizer step.", 1, minimum=1, maximum=65_536, shapes_run=True
    )
    sequence_parallel_size: int = setting(
        "Number of consecutive ranks that share each row, each with a part of its positions; --batch_size is then that "
        "of all of them together. It must divide the number of ranks and of attention heads.",
        1,
        minimum=1,
        shapes_run=True,
    )
    num_train_epochs: int = setting("Passes over the data.", 1, minimum=1, shapes_run=True)
    max_steps: int = setting(
        "Stop after this many optimizer steps and fit the schedule to them; 0: no limit.", 0, minimum=0, shapes_run=True
    )
    lr_scheduler: str = setting(
        "Learning rate schedule after the warm-up.",
        "cosine",
        choices=("cosine", "linear", "constant", "cosine_with_min_lr", "wsd", "inverse_sqrt"),
        shapes_run=True,
    )
    warmup: float = setting(
        "Steps over which the learning rate rises to --lr: up to 1 a fraction of all, above 1 their number.",
        0.01,
        minimum=0,
        shapes_run=True,
    )
    decay: float = setting(
        "Last steps over which wsd lowers the learning rate: up to 1 a fraction of all, above 1 their number.",
        DECAY,
        minimum=0,
        shapes_run=True,
    )
    min_lr_ratio: float = setting(
        "Learning rate at the end of cosine_with_min_lr and wsd, as a fraction of --lr.",
        0.0,
        minimum=0,
        maximum=1,
        shapes_run=True,
    )
    loss: str = setting(
        "cross_entropy, or dft, which weights each target token's by the probability that the model gives it.",
        "cross_entropy",
        choices=("cross_entropy", "dft"),
        shapes_run=True,
    )
    label_smoothing: float = setting(
        "Share of each target that is spread evenly over the vocabulary.", 0.0, minimum=0, below=1, shapes_run=True
    )
    neftune_alpha: float = setting(
        "Strength of NEFTune's noise on the embeddings in training; 0: none.", 0.0, minimum=0, shapes_run=True
    )
    weight_decay: float = setting(
        "Decoupled weight decay; not applied to norms and biases.", 0.01, minimum=0, maximum=1, shapes_run=True
    )
    adam_beta1: float = setting("Decay of Adam's first moment.", 0.9, minimum=0, below=1, shapes_run=True)
    adam_beta2: float = setting("Decay of Adam's second moment.", 0.999, minimum=0, below=1, shapes_run=True)
    adam_epsilon: float = setting("Added to the root of Adam's second moment.", 1e-8, above=0, shapes_run=True)
    max_grad_norm: float = setting("Clip the gradient norm to this; 0: no clipping.", 1.0, minimum=0, shapes_run=True)
    seed: int = setting(
        "Seed of the data order and of all random numbers.",
        42,
        minimum=0,
        maximum=2**32 - 1,
        shapes_run=True,
    )
    deterministic: bool = setting("Use only deterministic kernels (slower).", False)
    stop_on_nan: int = setting(
        "End the run with an error after this many steps in a row whose loss is infinite or NaN; 0: never.",
        5,
        minimum=0,
    )

    def __post_init__(self) -> None:
        """Check each value, and that no two contradict each other."""
        Settings.__post_init__(self)
        for name, steps in (("warmup", self.warmup), ("decay", self.decay)):
            if steps > 1 and steps % 1:
                raise UserError(f"--{name} {steps}: above 1 it is a number of steps, and must be a whole number")
        if self.decay != DECAY and self.lr_scheduler != "wsd":
            raise UserError(f"--decay {self.decay}: --lr_scheduler {self.lr_scheduler} has none; use wsd")
        if self.lr_scheduler == "cosine_with_min_lr" and not self.min_lr_ratio:
            raise UserError("--lr_scheduler cosine_with_min_lr: needs --min_lr_ratio, such as 0.1")
        if self.min_lr_ratio and self.lr_scheduler not in ("cosine_with_min_lr", "wsd"):
            raise UserError(
                f"--min_lr_ratio {self.min_lr_ratio}: --lr_scheduler {self.lr_scheduler} has none; use "
                "cosine_with_min_lr or wsd"
            )
        if self.loss == "dft" and self.label_smoothing:
            raise UserError(
                f"--label_smoothing {self.label_smoothing}: --loss dft is not defined with it; use only one of them"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings(Settings):
    """Evaluation."""

    eval_steps: int = setting("Evaluate every N steps and at the end; 0: only at the end.", 0, minimum=0)
    sample_prompts: str | None = setting(
        "File of prompts, one per line, to answer at each evaluation.", None, path=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadSettings(Settings):
    """Memory and DeepSpeed."""

    deepspeed_config: str = setting(
        "DeepSpeed JSON: where weights and optimizer state are kept.", "configs/superoffload.json", path=True
    )
    offload_ratio: float | Literal["auto"] = setting(
        "Fraction of the optimizer's state and work to keep on the host; auto takes the smallest that fits the "
        "device's free memory, or that of the checkpoint to resume from if that fits.",
        1.0,
        minimum=0,
        maximum=1,
    )
    preflight: bool = setting(
        "Stop before the weights are read if the run needs clearly more memory or disk space than there is.", True
    )
    optimizer_state: str = setting(
        "Precision of master weights, gradients and moments; bf16 needs half the memory, and loses updates that are "
        "small beside their weight.",
        "fp32",
        choices=("fp32", "bf16"),
        shapes_run=True,
    )
    offload_params: bool = setting(
        "Keep the weights on the host too; each layer is copied to the device when it runs.", False
    )
    sub_group_size: int = setting(
        "Parameters per sub-group of the optimizer, and elements per reduce bucket.", 400_000_000, minimum=1
    )
    verify_steps: int = setting(
        "In superoffload mode, check samples of the first N steps against plain arithmetic, and stop if one differs; "
        "-1: 3 on CUDA, 0 on the CPU.",
        -1,
        minimum=-1,
    )
    deepspeed: bool = setting("Accepted for compatibility; training always runs on DeepSpeed.", False)
    local_rank: int = setting("Set by the launcher.", -1, minimum=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSettings(Settings):
    """Output."""

    output_dir: str = setting(
        "Folder for checkpoints, the tokenizer, metrics.jsonl, summary.json and run.log.", path=True
    )
    log_interval: int = setting("Log every N steps.", 1, minimum=1)
    display: str = setting(
        "How to show progress: rich is a live display on a terminal, plain one line per logged step; auto uses rich if "
        "stderr is a terminal.",
        "auto",
        choices=("auto", "rich", "plain"),
    )
    log_level: str = setting(
        "Minimum severity of messages to show.", "INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSettings(Settings):
    """Checkpoint and resume."""

    save_checkpoint: bool = setting("Save a checkpoint after the last step.", False)
    save_steps: int = setting("Save a checkpoint every N steps; 0: never.", 0, minimum=0)
    save_minutes: float = setting("Save a checkpoint every M minutes; 0: never.", 0.0, minimum=0)
    keep_checkpoints: int = setting("Number of complete checkpoints to keep; older ones are removed.", 2, minimum=1)
    fail_on_checkpoint_error: bool = setting("Exit with status 3 if the last checkpoint or the export fails.", False)
    export: bool = setting("Export the last checkpoint to OUTPUT_DIR/model_stepN; needs --save_checkpoint.", False)
    resume: str = setting(
        "auto: resume from the newest complete checkpoint in the output folder, or start from the model if there is "
        "none; none: start from the model; or a checkpoint, or the output folder of a run.",
        "none",
        path=True,
    )
    resume_anyway: bool = setting("Resume even if settings or data differ from the checkpoint's.", False)
    trust_checkpoint: bool = setting(
        "Load a checkpoint even if its files could run code, e.g. one of another program.", False
    )

    def __post_init__(self) -> None:
        """Check each value, and that --export has a checkpoint to export."""
        Settings.__post_init__(self)
        if self.export and not self.save_checkpoint:
            raise UserError("--export: there is no checkpoint to export; add --save_checkpoint")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementSettings(Settings):
    """Measurement."""

    warmup_steps: int = setting("Number of initial steps that the summary leaves out.", 15, minimum=0)
    bench_steps: int = setting(
        "Stop after this many steps and print the measurement; 0: train to the end.", 0, minimum=0
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingSettings(Settings):
    """Trackers."""

    report_to: tuple[str, ...] = setting(
        "Where to log the run besides metrics.jsonl: one or more of wandb, tensorboard, trackio, mlflow.",
        ("none",),
        several=True,
        choices=("wandb", "tensorboard", "trackio", "mlflow", "none"),
    )
    use_wandb: bool = setting("The same as --report_to wandb, in addition to others.", False)
    wandb_project: str = setting("Project of the run; the experiment in MLflow.", "superoffload")
    wandb_run_name: str | None = setting("Name of the run; default: the model's name, main settings and time.", None)
    wandb_tags: tuple[str, ...] = setting("Tags of the run, in W&B and MLflow.", (), several=True)

    @property
    def trackers(self) -> tuple[str, ...]:
        """Return the names of the trackers in use, in the order given."""
        names = (*self.report_to, *(("wandb",) if self.use_wandb else ()))
        return tuple(name for name in dict.fromkeys(names) if name != "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of a run, in the groups that `--help` shows.

    `explicit` holds the names of the flags given on the command line: the DeepSpeed JSON may override a default,
    but contradicting an explicit flag is an error.
    """

    model: ModelSettings
    data: DataSettings
    training: TrainingSettings
    evaluation: EvaluationSettings
    offload: OffloadSettings
    output: OutputSettings
    checkpoint: CheckpointSettings
    measurement: MeasurementSettings
    tracking: TrackingSettings
    explicit: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Raise `UserError` if the groups contradict each other."""
        held_out = self.data.eval_dataset is not None or self.data.eval_percentage
        if self.evaluation.eval_steps and not held_out and self.evaluation.sample_prompts is None:
            raise UserError(
                f"--eval_steps {self.evaluation.eval_steps}: there is nothing to evaluate; add --eval_percentage, "
                "--eval_dataset or --sample_prompts"
            )

    @property
    def inputs(self) -> tuple[tuple[str, str], ...]:
        """Return what the run reads, as pairs of a flag and a hub id, folder or file."""
        data = self.data
        return (
            ("model_name", self.model.model_name),
            *(("dataset_name", name) for name in data.dataset_name),
            *((("eval_dataset", data.eval_dataset),) if data.eval_dataset else ()),
        )


GROUPS: dict[str, Any] = {
    "model": ModelSettings,
    "data": DataSettings,
    "training": TrainingSettings,
    "evaluation": EvaluationSettings,
    "offload": OffloadSettings,
    "output": OutputSettings,
    "checkpoint": CheckpointSettings,
    "measurement": MeasurementSettings,
    "tracking": TrackingSettings,
}


SPECS = {spec.name: spec for group in GROUPS.values() for spec in settings_of(group)}
"""Every setting by its name."""


def build(values: dict[str, Any], explicit: frozenset[str] = frozenset()) -> Config:
    """Build a Config from flat values, e.g. `{"model_name": "gpt2", "output_dir": "out"}`.

    Missing settings take their default. Raises `UserError` for a value outside its limits.
    """
    groups = {
        name: group(**{spec.name: values[spec.name] for spec in settings_of(group) if spec.name in values})
        for name, group in GROUPS.items()
    }
    return Config(**groups, explicit=explicit)


def flat(config: Config) -> dict[str, Any]:
    """Return every setting of a run by the name of its flag; the inverse of `build`."""
    return {
        spec.name: getattr(getattr(config, name), spec.name)
        for name, group in GROUPS.items()
        for spec in settings_of(group)
    }


def differences(config: Config, saved: dict[str, Any]) -> list[str]:
    """List the settings that make `config` a different run from the one that saved a checkpoint.

    `saved` holds the checkpoint's flat values; a setting that it lacks had its default. Each difference reads
    `--flag: checkpoint has ..., this run has ...`.
    """
    current = flat(config)
    result = []
    for name, spec in SPECS.items():
        if spec.metadata.get("shapes_run"):
            before = saved.get(name, spec.default)
            before = several(before) if "several" in spec.metadata else before
            after = current[name]
            if before != after:
                result.append(f"--{name}: checkpoint has {shown(before)}, this run has {shown(after)}")
    return result
