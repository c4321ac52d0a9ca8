"""Everything a run can be told, typed and documented field by field.

Defaults are the published ones of the DAFormer / MIC code line ("UDA" below: DACS, DAFormer, HRDA and MIC share
them) and of the MFM paper (arXiv 2509.13801). A YAML file states only what differs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Tracker = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"]
"""Those of Accelerate."""


@dataclass(kw_only=True)
class RunSection:
    folder: Path = Path("runs/quickstart")
    """Where everything of this run is written. The same folder again resumes the run."""


@dataclass(kw_only=True)
class DataSection:
    root: Path = Path("data/scenes")
    """Folder that holds the shard sets named below."""
    source: str = "game_train"
    """Shard set with labels that the student is supervised on."""
    target: str = "camera_train"
    """Shard set to adapt to. Its labels, if any, are read by `method.name: oracle` alone."""
    validation: str = "camera_val"
    """Labelled shard set that evaluation scores."""
    crop: tuple[int, int] = (512, 512)
    """Training crop (height, width) in pixels of the stored images. UDA: 512 x 512."""
    workers: int = 2
    """Loader processes per rank; 0 decodes in the training process. Does not change what is read."""
    bad_sample_limit: float = 0.001
    """Share of all samples that may be unreadable; with more the run stops with exit code 3."""
    render_scenes: bool = False
    """Render the embedded scenes into `root` at the start if they are not there yet."""


@dataclass(kw_only=True)
class ScenesSection:
    train: int = 600
    """Training images per domain."""
    val: int = 100
    """Validation images per domain."""
    size: tuple[int, int] = (256, 512)
    """Image (height, width) in pixels."""
    seed: int = 0
    """Seed of the streets, apart from the seed of the run: several runs share one data set."""


@dataclass(kw_only=True)
class ModelSection:
    backbone: str = "mit_b5"
    """`mit_b0` ... `mit_b5`, or any timm model that supports `features_only`. UDA: MiT-B5 or ResNet-101."""
    backbone_options: dict[str, Any] = field(default_factory=dict)
    """Passed on to timm, e.g. `{output_stride: 8, out_indices: [1, 2, 3, 4]}`."""
    pretrained: bool = False
    """Start from timm's ImageNet weights (downloaded by timm)."""
    weights: Path | None = None
    """Start from encoder weights in a local file (safetensors or torch) instead."""
    decoder: str = "daformer"
    """A file of mfm_dist/models/decoders."""
    decoder_options: dict[str, Any] = field(default_factory=dict)
    """Passed on to the decoder, e.g. `{width: 256}` or `{dilations: [6, 12]}`."""


@dataclass(kw_only=True)
class MethodSection:
    name: str = "dacs"
    """A file of mfm_dist/methods: source_only, oracle, dacs."""


@dataclass(kw_only=True)
class SelfTrainingSection:
    ema_decay: float = 0.999
    """Decay of the teacher, alpha. DAFormer, HRDA, MIC: 0.999; plain DACS: 0.99."""
    pseudo_threshold: float = 0.968
    """The pseudo-weight is the share of pixels the teacher is at least this sure of, tau. UDA: 0.968."""
    class_draw: Literal["batch", "image"] = "batch"
    """ClassMix draws from the classes of the whole micro-batch (DAFormer, MIC) or of each image (original DACS)."""
    jitter_prob: float = 0.8
    """Chance that a mixed micro-batch is colour-jittered. UDA: 0.8, although the option there says 0.2."""
    jitter_strength: float = 0.2
    """Brightness, contrast and saturation factors are 1 +- this; hue turns by +- this. UDA: 0.2; DACS: 0.25."""
    blur_prob: float = 0.5
    """Chance that a mixed micro-batch is blurred. UDA: 0.5."""


@dataclass(kw_only=True)
class MFMSection:
    enabled: bool = False
    """Add the masked feature modeling term to the method."""
    loss_weight: float = 1.0
    """Weight of the term, lambda. MFM: 1.0."""
    mask_ratio: float = 0.4
    """Chance of each grid cell to be hidden. MFM: 0.4."""
    loss_on: Literal["all", "hidden"] = "all"
    """Pixels that the term counts: every one (MFM), or only those under hidden cells."""
    ramp_from: int = 0
    """Step up to which the weight is 0; it then grows linearly. MFM: 0, no ramp."""
    ramp_to: int = 0
    """Step from which the weight is `loss_weight`. MFM: 0, no ramp."""
    update_bn: bool = True
    """Whether this pass counts in the student's BatchNorm running statistics (never while its weight is 0)."""


@dataclass(kw_only=True)
class RebuilderSection:
    depth: int = 2
    """Transformer blocks. MFM: 2."""
    width: int = 512
    """Channels of a block. MFM: 512."""
    heads: int = 16
    """Attention heads; must divide `width`. MFM: 16."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP over `width`. MFM: 4."""
    grid: tuple[int, int] = (16, 16)
    """Cells (rows, columns) a crop is cut into; one number means a square. MFM: 16, 32 x 32 pixels of a 512 crop."""


@dataclass(kw_only=True)
class OptimSection:
    name: Literal["adamw", "sgd"] = "adamw"
    """UDA: AdamW. SGD (momentum 0.9) is here for comparisons that Adam's normalisation would blur."""
    lr: float = 6e-5
    """Learning rate of the encoder. UDA: 6e-5."""
    decoder_lr_factor: float = 10.0
    """The decoder learns this many times faster. UDA: 10."""
    rebuilder_lr: float = 2e-4
    """Learning rate of the Rebuilder. MFM: 2e-4."""
    weight_decay: float = 0.01
    """Decoupled decay of every parameter but those of LayerNorms. UDA: 0.01."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging constants. UDA: torch's default."""
    eps: float = 1e-8
    """AdamW's epsilon. UDA: torch's default."""
    warmup_steps: int = 1500
    """Steps of linear warm-up, which multiplies the decaying rate. UDA: 1500."""
    warmup_ratio: float = 1e-6
    """Factor of the rate at step 0. UDA: 1e-6."""


@dataclass(kw_only=True)
class TrainSection:
    steps: int = 40_000
    """Global batches to train on. UDA: 40,000."""
    micro_batch: int = 2
    """Source images, and as many target images, in one forward. UDA: 2. Fixes every per-batch draw and mean."""
    global_batch: int = 2
    """Source images a step over all ranks, and as many target images. UDA: 2."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast over fp32 parameters; losses and the teacher's weights stay fp32."""
    clip_norm: float = 0.0
    """Largest global gradient norm; 0 turns clipping off. UDA: off."""
    deterministic: bool = False
    """Ask torch for deterministic GPU kernels (slower). CPU runs are deterministic anyway."""
    threads: int = 1
    """Torch threads per rank on a CPU. More changes sums in the last bits, so it is fixed here."""


@dataclass(kw_only=True)
class DebugSection:
    check_gradients: bool = False
    """Stop at a trainable parameter that a backward did not reach, by name."""
    audit_every: int = 1000
    """Steps between comparisons of what several ranks hold, bit by bit; 0: never."""


@dataclass(kw_only=True)
class WatchdogSection:
    seconds: float = 300.0
    """Silence of all ranks after which the run ends with exit code 76, naming who hung; 0: never. Less than NCCL's own
    limit of 600 s, which would abort without a name."""


@dataclass(kw_only=True)
class MemorySection:
    lean: bool = False
    """Run backward after each loss term instead of once for their sum: one term's activations are held at a time."""
    checkpoint_backbone: bool = False
    """Hold only the inputs of the encoder's blocks and compute the rest again in the backward pass. Costs time."""


@dataclass(kw_only=True)
class CheckpointSection:
    every: int = 2000
    """Steps between checkpoints; one is always written at the end and on a stop signal."""
    keep: int = 2
    """Newest checkpoints to keep."""
    background: bool = True
    """Write while training goes on. Takes main memory for one copy of the run's state on the machine of rank 0."""


@dataclass(kw_only=True)
class EvalSection:
    every: int = 4000
    """Steps between evaluations on `data.validation`; also done before step 0 and at the end. UDA: 4000."""
    overlays: int = 4
    """Images to save as overlays (image, label, prediction) at each evaluation."""


@dataclass(kw_only=True)
class LogSection:
    every: int = 50
    """Steps between lines of metrics.jsonl, of the console and of the trackers."""
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """Where else to log, by Accelerate's trackers; [] for nowhere. All but tensorboard have to be installed."""


@dataclass(kw_only=True)
class RunConfig:
    """A whole run. `config.problems` lists every contradiction; a run never starts with one."""

    seed: int = 0
    """Seed of every random draw of the run."""
    run: RunSection = field(default_factory=RunSection)
    data: DataSection = field(default_factory=DataSection)
    scenes: ScenesSection = field(default_factory=ScenesSection)
    model: ModelSection = field(default_factory=ModelSection)
    method: MethodSection = field(default_factory=MethodSection)
    self_training: SelfTrainingSection = field(default_factory=SelfTrainingSection)
    mfm: MFMSection = field(default_factory=MFMSection)
    rebuilder: RebuilderSection = field(default_factory=RebuilderSection)
    optim: OptimSection = field(default_factory=OptimSection)
    train: TrainSection = field(default_factory=TrainSection)
    memory: MemorySection = field(default_factory=MemorySection)
    debug: DebugSection = field(default_factory=DebugSection)
    watchdog: WatchdogSection = field(default_factory=WatchdogSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    eval: EvalSection = field(default_factory=EvalSection)
    log: LogSection = field(default_factory=LogSection)

    @property
    def blocks_per_step(self) -> int:
        """Micro-batches in one global batch, over all ranks."""
        return self.train.global_batch // self.train.micro_batch

    def world_problems(self, world_size: int) -> list[str]:
        """What does not fit this many ranks. The micro-batch is never changed to make it fit."""
        if self.blocks_per_step % world_size == 0:
            return []
        train = self.train
        fits = ", ".join(str(n * world_size * train.micro_batch) for n in range(1, 5))
        ranks = ", ".join(str(n) for n in range(1, self.blocks_per_step + 1) if self.blocks_per_step % n == 0)
        return [
            f"train.global_batch={train.global_batch} is {self.blocks_per_step} micro-batches of "
            f"{train.micro_batch}, which {world_size} processes cannot share evenly: use {ranks} processes, or a "
            f"global batch of {fits}, ..."
        ]
