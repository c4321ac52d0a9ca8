"""Everything a run can be told, typed and documented field by field.

Defaults are the published ones of the DAFormer / MIC code line ("UDA" below: DACS, DAFormer, HRDA and MIC share
them) and of the MFM paper (arXiv 2509.13801). A YAML file states only what differs. The numbers that a field allows
stand in its type; what fields do not allow together stands in ``validate``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Range:
    """Numbers that a field allows, written beside its type."""

    rule: str
    """What a number must be or do, for messages and ``--help``."""
    allows: Callable[[float], bool]


def between(low: float, high: float) -> Range:
    """Allow both and what lies between. Every number has a highest value: beyond it something breaks, or never ends."""
    return Range(f"lie between {low:,} and {high:,}", lambda number: low <= number <= high)


IntFrom0 = Annotated[int, between(0, 10**9)]
IntFrom1 = Annotated[int, between(1, 10**9)]
FloatFrom0 = Annotated[float, between(0, 10**9)]
FloatAbove0 = Annotated[float, Range("be above 0 and at most 1,000,000,000", lambda number: 0 < number <= 10**9)]
Share = Annotated[float, between(0, 1)]
LearningRate = Annotated[float, between(0, 1000)]
Beta = Annotated[float, Range("be at least 0 and below 1", lambda number: 0 <= number < 1)]
Epsilon = Annotated[float, Range("be above 0 and at most 1", lambda number: 0 < number <= 1)]
"""0 would divide 0 by 0 for a parameter whose gradient is 0."""
Seed = Annotated[int, between(0, 2**63 - 1)]
Pixels = Annotated[int, between(1, 32_768)]
Width = Annotated[int, between(1, 65_536)]
Depth = Annotated[int, between(1, 1000)]
Cells = Annotated[int, between(1, 1024)]
Batch = Annotated[int, between(1, 65_536)]
Threads = Annotated[int, between(1, 1024)]
Workers = Annotated[int, between(0, 1024)]
Factor = Annotated[float, between(0.01, 100)]
WatchdogSeconds = Annotated[
    float, Range("be 1 to 1,000,000 seconds, or 0 for never", lambda number: number == 0 or 1 <= number <= 10**6)
]
SpikeFactor = Annotated[
    float,
    Range("be above 1 and at most 1,000,000,000, or 0 for never", lambda number: number == 0 or 1 < number <= 10**9),
]
TracedSteps = Annotated[int, between(0, 100)]
SpikeWindow = Annotated[
    int, Range("be 1 to 10000 steps, whose losses every checkpoint holds", lambda number: 1 <= number <= 10_000)
]
"""``checkpoint.files`` reads no JSON beyond 4 MiB, of which 10,000 steps take about 0.4."""


@dataclass(kw_only=True)
class RunSection:
    folder: Path = Path("runs/quickstart")
    """Where everything of this run is written. The same folder again resumes the run."""


Sets = str | tuple[str, ...] | dict[str, FloatAbove0]
"""One shard set by its name; several as if they were one; several by name, each with its share of what is drawn."""


def names_of(sets: Sets | None) -> tuple[str, ...]:
    """Return the names of shard sets."""
    return () if sets is None else (sets,) if isinstance(sets, str) else tuple(sets)


STREAM_SCHEMES = ("pipe:", "s3:", "hf:", "http:", "https:")


def is_stream(name: str) -> bool:
    """Tell whether a shard set is a URL and not a folder."""
    return name.startswith(STREAM_SCHEMES)


@dataclass(kw_only=True)
class RareClassSection:
    enabled: bool = False
    """Draw source images for their rare classes, with replacement. DAFormer, HRDA, MIC: on; plain DACS: off."""
    temperature: FloatAbove0 = 0.01
    """T: a class is drawn by the softmax of (1 - frequency) / T. DAFormer: 0.01."""
    min_pixels: IntFrom0 = 3000
    """An image stands for a class of which it holds more than this many stored pixels. DAFormer: 3000, for labels of
    2 million pixels; smaller ones need less."""
    min_crop_ratio: FloatFrom0 = 0.5
    """The crop should hold more than this share of `min_pixels` of that class; it is drawn again up to 10 times.
    DAFormer: 0.5 for crops of 512 x 512; HRDA, MIC: 2 for 1024 x 1024."""


@dataclass(kw_only=True)
class DataSection:
    root: Path = Path("data/scenes")
    """Folder that holds the shard sets named below."""
    source: Sets = "game_train"
    """Shard set with labels that the student is supervised on, or several: a list is one large set, of which an epoch
    holds each sample once; `{gta/train: 0.5, synthia/train: 0.25, urbansyn/train: 0.25}` gives each its share of the
    images, relative to their sum."""
    target: Sets = "camera_train"
    """Shard set to adapt to, or several likewise. Its labels, if any, are read by `method.name: oracle` alone."""
    target_labelled: str | None = None
    """Shard set of a few labelled target images, which the student is supervised on beside the source: one more term,
    with as many images in a micro-batch. null: none."""
    validation: str | None = "camera_val"
    """Labelled shard set of the target that evaluation scores. null: there are no target labels, so no mIoU; evaluation
    then looks at `eval.unlabelled_images` of `target` (of several: of the first that is named)."""
    source_validation: str | None = None
    """Labelled shard set of the source, scored beside it as `source_miou`, which says little of the target."""
    classes: str | None = None
    """Class set to train on: cityscapes19, cityscapes7, synthia16, synthia13, or a class file. Classes of the shards
    become those of the same name, or those that merge them; the others are ignored. null: that of the shards, which
    must be the same in all."""
    crop: tuple[Pixels, Pixels] = (512, 512)
    """Training crop (height, width) in pixels of the stored images. UDA: 512 x 512."""
    workers: Workers = 2
    """Loader processes per rank, and threads that decode for an evaluation; 0 decodes in the training process. Does not
    change what is read."""
    bad_sample_limit: Share = 0.001
    """Share of all samples that may be unreadable; with more the run stops with exit code 3."""
    render_scenes: bool = False
    """Render those of the sets named above that are embedded scenes (game_train, game_val, camera_train, camera_val)
    into `root` at the start, where they are not there yet."""
    decoder: Literal["torchvision", "simplejpeg"] = "torchvision"
    """What decodes JPEG. simplejpeg has to be installed."""
    source_resize: tuple[Pixels, Pixels] | None = None
    """Source images are resized into this box (height, width), aspect kept, before the crop; null: as stored. UDA:
    720x1280 for GTA, 760x1280 for SYNTHIA, unless the shards were made at that size."""
    target_resize: tuple[Pixels, Pixels] | None = None
    """The same for target images. UDA: 512x1024 for Cityscapes."""
    scale_range: tuple[Factor, Factor] = (1.0, 1.0)
    """Source and target images are resized by a further factor out of this range, drawn for each. UDA: none."""
    target_margins: tuple[IntFrom0, IntFrom0, IntFrom0, IntFrom0] = (0, 0, 0, 0)
    """Rows and columns of stored target images (top, bottom, left, right) where pseudo-labels do not count. HRDA, MIC
    for Cityscapes at 1024x2048: [30, 240, 30, 30]; DAFormer at 512x1024: [15, 120, 0, 0]."""
    rare_class_sampling: RareClassSection = field(default_factory=RareClassSection)
    lanes: IntFrom0 = 0
    """Read each epoch in this many sequential parts, for data on slow or remote disks; a multiple of every number of
    processes that shall see the same order. 0: all of it in random order."""
    lane_window: IntFrom1 = 1000
    """Samples of a lane that are shuffled among themselves."""
    scratch: Path | None = None
    """Folder on a disk of each node to copy shards to before they are read. With `lanes` they are copied when their
    turn comes, else before the training begins."""
    scratch_gib: FloatFrom0 = 0.0
    """Size that `scratch` may grow to; shards that were not used for longest make room. 0: no limit."""
    stream_samples: IntFrom0 = 0
    """Samples of `source` or `target` where it is a URL (pipe:, s3:, hf:, http:); `bad_sample_limit` is a share."""


@dataclass(kw_only=True)
class ScenesSection:
    train: IntFrom1 = 600
    """Training images per domain."""
    val: IntFrom1 = 100
    """Validation images per domain."""
    size: tuple[Pixels, Pixels] = (256, 512)
    """Image (height, width) in pixels."""
    seed: Seed = 0
    """Seed of the streets, apart from the seed of the run: several runs share one data set."""
    gap: tuple[Literal["photometric", "texture", "layout"], ...] = ("photometric", "texture", "layout")
    """What the camera's scenes have of their own, in which the domains differ: light and sensor, materials, streets."""


@dataclass(kw_only=True)
class LoRASection:
    rank: Annotated[int, between(0, 4096)] = 0
    """Rank of the additions; 0: none. Needs `model.freeze` and the package peft; exports have them merged."""
    alpha: FloatAbove0 = 16.0
    """An addition is scaled by this over `rank`."""
    targets: tuple[str, ...] = ("attn.qkv", "attn.proj")
    """Layers that get one, by the end of their timm name; in a ViT also mlp.fc1 and mlp.fc2."""


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
    freeze: bool = False
    """Keep the encoder as it starts: no gradients, no optimiser state, evaluation mode, the same in the teacher. MFM
    then trains the Rebuilder and the decoder, and what `lora` adds."""
    lora: LoRASection = field(default_factory=LoRASection)
    decoder: str = "daformer"
    """A file of mfm_dist/models/decoders."""
    decoder_options: dict[str, Any] = field(default_factory=dict)
    """Passed on to the decoder, e.g. `{width: 256}` or `{dilations: [6, 12]}`."""


@dataclass(kw_only=True)
class MethodSection:
    name: str = "dacs"
    """A file of mfm_dist/methods: source_only, oracle, dacs, daformer, hrda, mic."""
    target_labelled_weight: FloatFrom0 = 1.0
    """Weight of the cross-entropy on `data.target_labelled`; that on the source has 1."""


@dataclass(kw_only=True)
class SelfTrainingSection:
    ema_decay: Share = 0.999
    """Decay of the teacher, alpha. DAFormer, HRDA, MIC: 0.999; plain DACS: 0.99."""
    pseudo_threshold: Share = 0.968
    """The pseudo-weight is the share of pixels the teacher is at least this sure of, tau. UDA: 0.968."""
    class_draw: Literal["batch", "image"] = "batch"
    """ClassMix draws from the classes of the whole micro-batch (DAFormer, MIC) or of each image (original DACS)."""
    jitter_prob: Share = 0.8
    """Chance that a mixed micro-batch is colour-jittered. UDA: 0.8, although the option there says 0.2."""
    jitter_strength: FloatFrom0 = 0.2
    """Brightness, contrast and saturation factors are 1 +- this; hue turns by +- this. UDA: 0.2; DACS: 0.25."""
    blur_prob: Share = 0.5
    """Chance that a mixed micro-batch is blurred. UDA: 0.5."""
    augment_form: Literal["published", "fast"] = "published"
    """Jitter in HSV, one change after the other, or folded into one matrix with a batched blur: the same draws, nearly
    the same pictures, a fraction of the kernels."""
    pseudo_weight_ignore_top: IntFrom0 = 0
    """Rows at the top of every target crop whose pseudo-label counts nothing. DAFormer on Cityscapes at 512: 15."""
    pseudo_weight_ignore_bottom: IntFrom0 = 0
    """The same at the bottom, the own bonnet. DAFormer on Cityscapes at 512: 120. Right only where crops are as high
    as the stored images."""


@dataclass(kw_only=True)
class DAFormerSection:
    feature_distance_weight: FloatFrom0 = 0.005
    """Weight of the distance to the initial encoder's features, in daformer, hrda and mic on them. DAFormer: 0.005."""
    feature_distance_share: Share = 0.75
    """Share of a feature's pixels that one thing class must cover for the feature to count. DAFormer: 0.75."""


@dataclass(kw_only=True)
class HRDASection:
    detail_loss_weight: Share = 0.1
    """Weight of the loss on the detail crop; the fused prediction has the rest. HRDA: 0.1."""
    attention: str = "segformer"
    """Decoder that weighs detail against context; its stride must be that of `model.decoder`. HRDA: segformer, and
    deeplabv2 beside deeplabv2."""
    attention_options: dict[str, Any] = field(default_factory=lambda: {"width": 256})
    """Passed on to it. HRDA: {width: 256}, and {} for deeplabv2."""


@dataclass(kw_only=True)
class MICSection:
    base_method: Literal["source_only", "dacs", "daformer", "hrda"] = "hrda"
    """The method that masked image consistency is added to."""
    mode: Literal["separatetrg", "separatesrc", "separate"] = "separatetrg"
    """What is masked: target images, labelled source images, or half of each. MIC: separatetrg from synthetic data,
    separate from Cityscapes."""
    augment: bool = True
    """Jitter and blur before masking, as mixed images are. MIC: true from synthetic data, false from Cityscapes."""
    mask_ratio: Share = 0.7
    """Chance of each block to be hidden. MIC: 0.7."""
    mask_block_pixels: Pixels | None = None
    """Side of a hidden block, pixels of the crop; null: a 16th of its height. MIC: 64 in 1024 crops, 32 in 512."""
    loss_weight: FloatFrom0 = 1.0
    """Weight of the masked images' loss. MIC: 1."""
    pseudo_threshold: Share | None = None
    """Threshold of a pseudo-weight of their own; null: the weight of the step (MIC), 0: every pixel weighs 1."""


@dataclass(kw_only=True)
class MFMSection:
    enabled: bool = False
    """Add the masked feature modeling term to the method."""
    loss_weight: FloatFrom0 = 1.0
    """Weight of the term, lambda. MFM: 1.0."""
    mask_ratio: Share = 0.4
    """Share of the grid cells to hide. MFM: 0.4."""
    mask_block_cells: Cells = 1
    """Side, in grid cells, of the squares that are hidden together; must divide `rebuilder.grid`. MFM: 1, a cell of
    32 x 32 pixels and 4 x 4 features. With blocks much smaller than that, averaging the neighbours solves the task."""
    mask: Literal["bernoulli", "exact"] = "bernoulli"
    """Each block is hidden independently (MFM), or the same number of blocks in every image (stable)."""
    loss_on: Literal["all", "hidden"] = "all"
    """Pixels that the term counts: every one (MFM), or only those under hidden cells (stable)."""
    gradient_budget: FloatFrom0 = 0.0
    """Largest gradient that the term may send to the encoder's last map, as a share of the method's own gradient there
    (both averaged over steps): above it the weight is lowered. 0: no limit, as in MFM; stable: 0.5."""
    ramp_from: IntFrom0 = 0
    """Step up to which the weight is 0; it then grows linearly. MFM: 0, no ramp."""
    ramp_to: IntFrom0 = 0
    """Step from which the weight is `loss_weight`. MFM: 0, no ramp."""
    update_bn: bool = True
    """Whether this pass counts in the student's BatchNorm running statistics (never while its weight is 0)."""
    reconstruction: Literal["classes", "teacher_features", "student_features", "pixels"] = "classes"
    """What is asked of the rebuilt part: the class of each pixel through the decoder (MFM), or by regression the
    features of teacher or student, or the image. MFM, table of reconstruction targets."""
    use_rebuilder: bool = True
    """False: hidden features are 0 and stay so, and there is no Rebuilder. MFM, row "mask without rebuilding"."""
    domain: Literal["target", "source", "both"] = "target"
    """Images the term is about: of the target with pseudo-labels (MFM), of the source with labels, or both, each with
    the weight lambda. MFM, table of domains."""
    trained_parts: Literal["both", "encoder", "decoder"] = "both"
    """What the term trains beside the Rebuilder; the rest gets a gradient of 0 from it. MFM, table of what is trained:
    both."""
    view: Literal["context", "detail", "fused"] = "context"
    """Under HRDA: the down-scaled whole crop, a window of it at full resolution, or both rebuilt, then fused and with
    HRDA's loss. The paper does not say; its authors' code hints at the last, which HRDA's files in configs have.
    Elsewhere it is the crop."""


@dataclass(kw_only=True)
class RebuilderSection:
    variant: Literal["paper", "stable"] = "paper"
    """Defaults of what is below, of `mfm` and of `optim.rebuilder_base_width`: the paper's, or those of
    `config.variants`, which let it grow. What a file or the command line says comes after them, so that each of the
    stable variant's ingredients can be turned off by itself."""
    depth: Depth = 2
    """Transformer blocks. MFM: 2."""
    width: Width = 512
    """Channels of a block. MFM: 512."""
    heads: Width = 16
    """Attention heads; must divide `width`. MFM: 16."""
    mlp_ratio: Factor = 4.0
    """Hidden width of a block's MLP over `width`. MFM: 4."""
    grid: tuple[Cells, Cells] = (16, 16)
    """Cells (rows, columns) a crop is cut into; one number means a square. MFM: 16, 32 x 32 pixels of a 512 crop."""
    qk_norm: bool = False
    """Normalise queries and keys, so that no attention logit grows without bound, for runs whose
    `rebuilder/max_logit` does. MFM and stable: false."""
    peri_norm: bool = False
    """Normalise what attention and MLP of a block add to its input, too, so that no rate makes the sum outgrow what the
    cells say. MFM: false; stable: true."""
    depth_scaling: bool = False
    """Scale the branches of the blocks by 2 / `depth`, so that a step changes a deep trunk's output as much as that of
    the paper's 2 blocks. MFM: false; stable: true."""
    readout: Annotated[int, between(0, 1000)] = 0
    """Above 0 the blocks run over visible cells alone, and so many further ones of cross-attention let the hidden cells
    read them: far less memory on fine grids. Needs `mfm.mask: exact`. MFM: 0; stable: 2."""


@dataclass(kw_only=True)
class OptimSection:
    name: Literal["adamw", "sgd"] = "adamw"
    """UDA: AdamW. SGD (momentum 0.9) is here for comparisons that Adam's normalisation would blur."""
    lr: LearningRate = 6e-5
    """Learning rate of the encoder. UDA: 6e-5."""
    decoder_lr_factor: FloatFrom0 = 10.0
    """The decoder, and a pyramid before it, learn this many times faster. UDA: 10."""
    layer_decay: Annotated[float, Range("be above 0 and at most 1", lambda number: 0 < number <= 1)] = 1.0
    """The encoder's last block learns at `lr`, each one before it at this times the rate of the next, the embedding
    slowest. VFM-UDA++ with DINOv2: 0.9; UDA: 1, one rate for all."""
    rebuilder_lr: LearningRate = 2e-4
    """Learning rate of the Rebuilder. MFM: 2e-4."""
    rebuilder_base_width: Annotated[int, between(0, 65_536)] = 0
    """Width that `rebuilder_lr` was chosen at. Matrices of a Rebuilder that is wider learn at the rate times this over
    its width, so that a step changes the output as much. 0: no scaling, as in MFM; stable: 512."""
    weight_decay: FloatFrom0 = 0.01
    """Decoupled decay of every parameter but those of LayerNorms. UDA: 0.01."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's averaging constants. UDA: torch's default."""
    eps: Epsilon = 1e-8
    """AdamW's epsilon. UDA: torch's default."""
    warmup_steps: IntFrom0 = 1500
    """Steps of linear warm-up, which multiplies the decaying rate. UDA: 1500."""
    warmup_ratio: Share = 1e-6
    """Factor of the rate at step 0. UDA: 1e-6."""


@dataclass(kw_only=True)
class TrainSection:
    steps: IntFrom1 = 40_000
    """Global batches to train on. UDA: 40,000."""
    micro_batch: Batch = 2
    """Source images, and as many target images, in one forward. UDA: 2. Fixes every per-batch draw and mean."""
    global_batch: IntFrom1 = 2
    """Source images a step over all ranks, and as many target images. UDA: 2."""
    precision: Literal["fp32", "bf16", "bf16_weights"] = "fp32"
    """bf16: autocast over fp32 parameters; losses and the teacher's weights stay fp32. bf16_weights, for the largest
    models, under ZeRO-2 and 3: the weights are bf16 too, of fp32 ones that optimiser and teacher keep in shards."""
    fp32_math: Literal["ieee", "tf32"] = "ieee"
    """What a GPU computes fp32 matrix products and convolutions in. ieee: in fp32, as a CPU does, so that runs compare.
    tf32: with 10 bits of mantissa, faster. It concerns what `precision` leaves in fp32: with bf16, evaluations."""
    clip_norm: FloatFrom0 = 0.0
    """Largest global gradient norm; 0 turns clipping off. UDA: off."""
    clip_parts: dict[str, Any] = field(default_factory=dict)
    """Largest gradient norm of single parts, applied before `clip_norm`: of encoder, decoder, rebuilder."""
    encode_once: Literal["auto", "always", "never"] = "auto"
    """Encode the images of all loss terms in one call: the same step in a third of the kernels, which is what a GPU
    waits for. auto: where nothing in the encoder looks at the batch (BatchNorm), and not with `memory.lean`."""
    compile: bool = False
    """Compile student, teacher, initial encoder and the Rebuilder's blocks by torch.compile. Takes minutes at the
    start, and on a CPU a C++ compiler."""
    cuda_graph: bool = False
    """On GPUs: capture forward and backward of a micro-batch in a CUDA graph once and replay it for every other, the
    same step without the time that launching its kernels takes. Its memory stays taken. Not under ZeRO, nor with
    `memory.checkpoint_*`. Not run on a GPU yet."""
    deterministic: bool = False
    """Ask torch for deterministic GPU kernels (slower). CPU runs are deterministic anyway."""
    threads: Threads = 1
    """Torch threads per rank on a CPU. More changes sums in the last bits, so it is fixed here."""


@dataclass(kw_only=True)
class MemorySection:
    lean: bool = False
    """Run backward after each loss term instead of once for their sum: one term's activations are held at a time."""
    checkpoint_backbone: bool = False
    """Hold only the inputs of the encoder's blocks and compute the rest again in the backward pass. Costs time."""
    checkpoint_rebuilder: bool = False
    """The same for the Rebuilder's blocks."""
    offload_optimizer: bool = False
    """Keep the optimiser's state and its step in main memory instead of the GPU's; under ZeRO 1 to 3. Costs time."""


@dataclass(kw_only=True)
class DebugSection:
    check_gradients: bool = False
    """Stop at a trainable parameter that a backward did not reach, by name."""
    audit_every: IntFrom0 = 1000
    """Steps between comparisons of what several ranks hold, bit by bit; 0: never."""


@dataclass(kw_only=True)
class RecoverySection:
    rollback_after: IntFrom0 = 5
    """Steps skipped in a row, because a loss or gradient was not finite or above its ceiling, after which the run goes
    back to its last checkpoint and passes over the data that led there; 0: never."""
    rollbacks: IntFrom0 = 3
    """Times that a run may go back; it then ends with exit code 5."""
    spike_factor: SpikeFactor = 0.0
    """Skip a step whose loss or gradient norm is this many times the median of the last applied steps; 0: never."""
    spike_window: SpikeWindow = 100
    """Applied steps that the medians are of. The rule waits until there are as many."""


@dataclass(kw_only=True)
class WatchdogSection:
    seconds: WatchdogSeconds = 300.0
    """Silence of all ranks after which the run ends with exit code 76, naming who hung; 0: never. Six times as long
    at the start, while the networks are compiled and while a checkpoint is waited for."""


@dataclass(kw_only=True)
class CheckpointSection:
    every: IntFrom1 = 2000
    """Steps between checkpoints; one is always written at the end and on a stop signal."""
    keep: IntFrom1 = 2
    """Newest checkpoints to keep."""
    background: bool = True
    """Write while training goes on. Takes main memory of each rank for a copy of what it writes, its share of the
    state."""


@dataclass(kw_only=True)
class EvalSection:
    every: IntFrom1 = 4000
    """Steps between evaluations on `data.validation`; also done before step 0 and at the end. UDA: 4000."""
    unlabelled_images: IntFrom1 = 20
    """Where `data.validation` is null: look at this many images of `data.target`, the first ones (agreement of student
    and teacher, pseudo-weight, entropy, confidence; none of them is an accuracy)."""
    resize: tuple[Pixels, Pixels] | None = None
    """Images are predicted fitted into this box (height, width), aspect kept, and the logits enlarged to the stored
    size, where labels are scored; null: as stored. UDA with 512 crops: 512x1024 for Cityscapes, 540x960 for ACDC and
    Dark Zurich."""
    class_sets: tuple[str, ...] = ()
    """Also give the mean IoU over these groups of the run's classes, in both conventions of the literature;
    cityscapes19 has synthia16 and synthia13."""
    overlays: IntFrom0 = 4
    """Images to save as overlays (image, label if there is one, prediction) at each evaluation."""


Tracker = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"]
"""Those of Accelerate."""


@dataclass(kw_only=True)
class ProfileSection:
    start: IntFrom0 = 10
    """Steps before it begins; the first ones are slower than the rest."""
    steps: TracedSteps = 0
    """Steps that it holds; 0: none. A file of some MB a step, and the steps are slower meanwhile."""


@dataclass(kw_only=True)
class LogSection:
    every: IntFrom1 = 50
    """Steps between lines of metrics.jsonl, of the console and of the trackers."""
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """Where else to log, by Accelerate's trackers; [] for nowhere. All but tensorboard have to be installed."""
    profile: ProfileSection = field(default_factory=ProfileSection)
    """Write a chrome trace of some steps of rank 0 into the run folder, `trace_STEP.json.gz`, once in each start."""


@dataclass(kw_only=True)
class RunConfig:
    """A whole run. `validate.problems` lists every contradiction; a run never starts with one."""

    seed: Seed = 0
    """Seed of every random draw of the run."""
    run: RunSection = field(default_factory=RunSection)
    data: DataSection = field(default_factory=DataSection)
    scenes: ScenesSection = field(default_factory=ScenesSection)
    model: ModelSection = field(default_factory=ModelSection)
    method: MethodSection = field(default_factory=MethodSection)
    self_training: SelfTrainingSection = field(default_factory=SelfTrainingSection)
    daformer: DAFormerSection = field(default_factory=DAFormerSection)
    hrda: HRDASection = field(default_factory=HRDASection)
    mic: MICSection = field(default_factory=MICSection)
    mfm: MFMSection = field(default_factory=MFMSection)
    rebuilder: RebuilderSection = field(default_factory=RebuilderSection)
    optim: OptimSection = field(default_factory=OptimSection)
    train: TrainSection = field(default_factory=TrainSection)
    memory: MemorySection = field(default_factory=MemorySection)
    debug: DebugSection = field(default_factory=DebugSection)
    recovery: RecoverySection = field(default_factory=RecoverySection)
    watchdog: WatchdogSection = field(default_factory=WatchdogSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    eval: EvalSection = field(default_factory=EvalSection)
    log: LogSection = field(default_factory=LogSection)

    @property
    def two_resolutions(self) -> bool:
        """True where the segmentor is HRDA's, of context and detail."""
        return "hrda" in (self.method.name, self.mic.base_method if self.method.name == "mic" else "")

    @property
    def method_label(self) -> str:
        """The method for people: mic says on what."""
        return self.method.name + (f" on {self.mic.base_method}" if self.method.name == "mic" else "")

    @property
    def blocks_per_step(self) -> int:
        """Micro-batches in one global batch, over all ranks."""
        return self.train.global_batch // self.train.micro_batch

    @property
    def images_per_step(self) -> int:
        """Images in one global batch: of source and target and, where there are any, labelled ones of the target."""
        return (3 if self.data.target_labelled else 2) * self.train.global_batch

    def world_problems(self, world_size: int) -> list[str]:
        """List what does not fit this many ranks. The micro-batch is never changed to make it fit."""
        if self.data.lanes % world_size:
            lanes = self.data.lanes
            return [f"data.lanes={lanes} cannot be shared evenly by {world_size} processes: use a multiple of both"]
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
