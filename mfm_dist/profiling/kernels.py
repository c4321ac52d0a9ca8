"""Count what a GPU would be asked to do in one step, on a machine without one: mfm-profile kernels mfm.enabled=true

One whole step of one micro-batch runs on fake CPU tensors, which have shapes and no numbers: forward, backward,
clipping, optimiser, EMA.
Every operator that is no view is one kernel; a fused or for-each operator of the optimiser is one, too, though a GPU
may cut it in several. In bf16, types are cast as CUDA's autocast does, whose lists differ from a CPU's; attention is
one operator. Of a micro-batch that draws jitter and blur. What it says of time is a bound: no kernel is faster than
its bytes and FLOP allow. torch.compile and CUDA graphs, which fuse and batch kernels, are not seen.
Where the host would wait for the device is looked for in a second step, a real one, of small images.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from mfm_dist.batch import UDABatch
from mfm_dist.config.arguments import add_run_arguments
from mfm_dist.config.loader import load_config
from mfm_dist.config.schema import RunConfig
from mfm_dist.distributed.clipping import Ceilings, clip_factors, is_good, sum_of_squares
from mfm_dist.distributed.running_statistics import KeptStatistics
from mfm_dist.distributed.teacher import update_teacher
from mfm_dist.errors import EXIT_DONE, ConfigError, tell_user_errors
from mfm_dist.optim import build_optimizer
from mfm_dist.profiling.counting import blank_batch, build_without_storage
from mfm_dist.profiling.host_syncs import DEEPSPEED, OPTIMIZER, OURS, HostSyncs, count_host_syncs
from mfm_dist.profiling.records import write_record
from mfm_dist.rng import Stream, keyed_generator
from mfm_dist.run.cards import CARDS, peak_flops
from mfm_dist.train_module import TrainModule

LOWER = {
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "bilinear"),
    *("matmul", "__matmul__", "__rmatmul__", "mm", "mv", "bmm", "addmm", "addbmm", "baddbmm", "einsum"),
    "scaled_dot_product_attention",
}
"""Functions that CUDA's autocast runs in the lower precision (torch.amp, "Autocast Op Reference")."""
FP32 = {
    *("layer_norm", "group_norm", "softmax", "log_softmax", "softmin", "softplus", "cross_entropy", "nll_loss"),
    *("l1_loss", "mse_loss", "smooth_l1_loss", "kl_div", "cosine_similarity", "normalize", "interpolate"),
    *("exp", "expm1", "log", "log10", "log2", "log1p", "pow", "__pow__", "__rpow__", "reciprocal", "rsqrt", "norm"),
    *("vector_norm", "linalg_vector_norm", "sum", "prod", "cumsum", "cumprod", "renorm"),
}
"""Functions that it runs in fp32."""
WIDEST = {"cat", "stack", "addcmul", "addcdiv", "index_put", "scatter_add"}
"""Functions that it runs in the widest type among their arguments."""

NO_KERNEL = ("aten.empty", "aten.new_empty", "aten.empty_like", "aten._unsafe_view", "aten.alias", "prim.device")
"""Operators that launch nothing, beside views."""
TRIES = 1000
"""Blocks among which one is looked for that draws both jitter and blur."""


@dataclass
class Count:
    """What was counted of the step, or of a part of it."""

    kernels: int = 0
    bytes: int = 0
    """Read and written, each operator by itself, as without any cache."""
    flop: int = 0
    """Of matrix products and convolutions, two a multiply-add."""
    casts: int = 0
    """Kernels that change a type and nothing else."""

    def add(self, other: Count) -> None:
        """Count the other's, too."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


class Counter(TorchDispatchMode):
    """Counts operators as they are dispatched, by the part of the step that is named at the time."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Count] = {}
        self.part = "losses, mixing and the rest"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and not str(func).startswith(NO_KERNEL):
            self.parts.setdefault(self.part, Count()).add(_cost(func, args, kwargs or {}, out))
        return out

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Count what runs in here as this part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def watch(self, part: str, module: nn.Module) -> None:
        """Count the forward of a module as this part."""
        outside: list[str] = []

        def enter(*_: Any) -> None:
            outside.append(self.part)
            self.part = self.part if self.part == "teacher" else part

        def leave(*_: Any) -> None:
            self.part = outside.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)


def _cost(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Count:
    read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    inputs = {id(tensor) for tensor in read}
    moved = sum(tensor.nbytes for tensor in read)
    # What an operator changes in place is written, whether it is also returned or not.
    written = [tensor for tensor in made if id(tensor) not in inputs]
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    moved += sum(tensor.nbytes for tensor in written)
    cast = "_to_copy" in str(func) and len(read) == len(made) == 1 and read[0].dtype != made[0].dtype
    return Count(kernels=1, bytes=moved, flop=_flop(func, args, kwargs, out), casts=int(cast))


def _flop(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Count two a multiply-add of matrix products, convolutions and attention; 0 of all else."""
    name, backward = str(func), "backward" in str(func)
    if name.startswith("aten.convolution"):  # torch's own rule forgets the groups in the backward
        grad_or_none, image, weight = args[:3] if backward else (None, *args[:2])
        places = (image if args[7 if backward else 6] else (out if grad_or_none is None else grad_or_none)).numel()
        products = sum(args[10][:2]) if backward else 1  # gradients that are asked for
        return int(2 * places * prod(weight.shape[1:]) * products)
    if "flash_attention_for_cpu" in name:  # two products; in the backward five, as it computes the first one again
        q, k, v = args[1:4] if backward else args[:3]
        widths = 3 * q.shape[-1] + 2 * v.shape[-1] if backward else q.shape[-1] + v.shape[-1]
        return int(2 * prod(q.shape[:-1]) * k.shape[-2] * widths)
    rule = flop_registry.get(func._overloadpacket)
    return 0 if rule is None else int(rule(*args, **kwargs, out_val=out))


class CudaAutocast(TorchFunctionMode):
    """Casts the arguments of functions to bf16 or fp32 as autocast does on CUDA, weights once.

    torch's own does nothing on fake tensors. The few functions that switch autocast off (of the augmentation) are cast.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, to = getattr(func, "__name__", ""), None
        if name in LOWER:
            to = torch.bfloat16
        elif name in FP32:
            to = torch.float32
        elif name in WIDEST:
            given = {leaf.dtype for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            to = torch.float32 if {torch.float32, torch.bfloat16} <= given else None
        if to is not None:
            args, kwargs = tree_map(lambda leaf: self._cast(leaf, to), (args, kwargs))
        return func(*args, **(kwargs or {}))

    def _cast(self, leaf: Any, to: torch.dtype) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dtype not in (torch.float32, torch.bfloat16) or leaf.dtype == to:
            return leaf
        if leaf.is_leaf and leaf.requires_grad and to == torch.bfloat16:
            if id(leaf) not in self.weights:
                self.weights[id(leaf)] = leaf.to(to)
            return self.weights[id(leaf)]
        return leaf.to(to)


@dataclass
class StepCount:
    """One step, counted."""

    parts: dict[str, Count] = field(default_factory=dict)
    saved_bytes: int = 0
    """Held for the backward at its beginning, weights not among them; with ``memory.lean`` that of the largest term."""
    cast_weight_bytes: int = 0
    """Of them, weights in the lower precision, which autocast holds beside those of fp32."""

    @property
    def whole(self) -> Count:
        """All parts together."""
        total = Count()
        for part in self.parts.values():
            total.add(part)
        return total


def count_kernels(config: RunConfig) -> StepCount:
    """Run one step of a configuration on fake tensors and count.

    Raises:
        ConfigError: networks that cannot be built; a precision or an option whose step is not this one.
    """
    if config.train.precision == "bf16_weights":
        raise ConfigError("kernels are counted over weights of fp32: set train.precision=fp32 or bf16")
    module = build_without_storage(config)
    for name in ("jitter_prob", "blur_prob"):  # which no other count wants
        setattr(module.config.self_training, name, getattr(config.self_training, name))
    counter, fake = Counter(), FakeTensorMode()
    batch = _drawn_batch(module)
    with fake:
        module._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        module.pop_map_squares()  # no buffer: zeros of the meta device, which gradients cannot be added to
        optimizer = build_optimizer(module, config.optim, fused=True)
        statistics = KeptStatistics(module.student)
    batch = batch.map(fake.from_tensor)
    _watch_parts(counter, module)
    found, inputs, loss = StepCount(counter.parts), None, torch.zeros(())
    with fake, counter:
        with counter.within("clipping"):
            statistics.keep()
        for term in module.term_names if config.memory.lean else [None]:
            saved, autocast = Saved({p.untyped_storage()._cdata for p in module.parameters()}), CudaAutocast()
            with ExitStack() as stack:
                if config.train.precision == "bf16":
                    stack.enter_context(autocast)
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor))
                output = module(batch, config.mfm.loss_weight, term, inputs)
                loss, inputs = output.total, output.inputs
            with counter.within("backward"), autocast if config.train.precision == "bf16" else nullcontext():
                # What loss.backward() calls, which switches modes off; activations computed again need autocast.
                _engine_run_backward(
                    (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
            found.cast_weight_bytes = max(found.cast_weight_bytes, sum(t.nbytes for t in autocast.weights.values()))
            found.saved_bytes = max(found.saved_bytes, saved.bytes)
            del output, autocast
        with counter.within("clipping"), torch.no_grad():
            statistics.put_back(unless=_clip(optimizer, loss.detach(), config))
        with counter.within("first step alone"):  # makes the optimiser's state
            optimizer.step()
        with counter.within("optimiser"):
            optimizer.step()
        with counter.within("EMA"), torch.no_grad():
            update_teacher(list(module.teacher_pairs()), torch.zeros(()))
    del counter.parts["first step alone"]
    return found


def _drawn_batch(module: TrainModule) -> UDABatch:
    """Return a micro-batch of zeros, of the first block that draws jitter and blur (block 0, if none does)."""
    config, settings, block = module.config, module.config.self_training, 0
    for number in range(TRIES):
        draws = keyed_generator(config.seed, Stream.STRONG_AUGMENT, number).random(2)
        if draws[0] < settings.jitter_prob and draws[1] < settings.blur_prob:
            block = number
            break
    return module.draw(blank_batch(config, block))


def _watch_parts(counter: Counter, module: TrainModule) -> None:
    if module.teacher is not None:
        counter.watch("teacher", module.teacher)
    if module.initial_encoder is not None:
        counter.watch("initial encoder", module.initial_encoder)
    counter.watch("encoder", module.student.backbone)
    for head in module.student.heads:
        counter.watch("decoder", head)
    if module.rebuilder is not None:
        counter.watch("rebuilder", module.rebuilder)


def _clip(optimizer: torch.optim.Optimizer, loss: Tensor, config: RunConfig) -> Tensor:
    """Do what ``Engine.step`` does between backward and update, in one process; return whether all is well."""
    parts: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        parts.setdefault(group["part"], []).extend(p.grad for p in group["params"] if p.grad is not None)
    norms = torch.stack([sum_of_squares(gradients, loss.device) for gradients in parts.values()]).sqrt()
    good = is_good(norms, loss, Ceilings())
    limits = norms.new_full((len(parts),), math.inf)
    factors = torch.where(good, clip_factors(norms, limits, config.train.clip_norm), math.nan)
    for gradients, factor in zip(parts.values(), factors, strict=True):
        torch._foreach_mul_(gradients, factor)
    return good


class Saved:
    """Sums the bytes saved for the backward, each storage once."""

    def __init__(self, weights: set[int]) -> None:
        self.seen = weights
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """Count a tensor that is saved."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.bytes += storage.nbytes()
        return tensor


def roofline_ms(count: Count, card: str, precision: str) -> float:
    """Return the time in ms below which no card of this name gets: of its bytes, or of its FLOP if that is longer."""
    rates = CARDS[card]
    return 1000 * max(count.bytes / rates.bandwidth, count.flop / peak_flops(rates, precision, tf32=False))


def small_step(path: Path | None, overrides: Sequence[str]) -> RunConfig:
    """Load a configuration with the smallest images that its networks take; what waits does not depend on them."""
    config = load_config(path, overrides)
    for factor in (8, 4, 2):
        (height, width), (rows, columns) = config.data.crop, config.rebuilder.grid
        smaller = [
            f"data.crop=[{height // factor},{width // factor}]",
            f"rebuilder.grid=[{rows // factor},{columns // factor}]",
        ]
        if height % (64 * factor) == width % (64 * factor) == rows % factor == columns % factor == 0:
            with suppress(ConfigError):
                return load_config(path, [*overrides, *smaller])
    return config


def as_record(counted: StepCount, syncs: HostSyncs, config: RunConfig, card: str) -> dict[str, Any]:
    """Return plain numbers: those of the whole step at the top, and of its parts by name."""

    def numbers(count: Count) -> dict[str, Any]:
        found = {each.name: getattr(count, each.name) for each in fields(count)}
        return {**found, "roofline_ms": round(roofline_ms(count, card, config.train.precision), 3)}

    return {
        **numbers(counted.whole),
        "saved_bytes": counted.saved_bytes,
        "host_syncs": syncs.of(OURS),
        "host_syncs_apart": {whose: syncs.of(whose) for whose in (DEEPSPEED, OPTIMIZER)},
        "host_sync_places": {
            f"{sync.place} {sync.kind}": number for sync, number in syncs.found.items() if sync.whose == OURS
        },
        "card": card,
        "precision": config.train.precision,
        "parts": {name: numbers(part) for name, part in counted.parts.items()},
    }


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="mfm-profile kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_arguments(parser, "the published network, MiT-B5 with the DAFormer decoder")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="instead of train.precision")
    parser.add_argument("--card", choices=sorted(CARDS), default="h100", help="whose bound is printed (h100)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all counts here")
    arguments = parser.parse_intermixed_args(argv)
    overrides = list(arguments.overrides)
    overrides += [f"train.precision={arguments.precision}"] if arguments.precision else []
    config = load_config(arguments.config, overrides)
    counted, small = count_kernels(config), small_step(arguments.config, overrides)
    syncs = count_host_syncs(small, [blank_batch(small, block) for block in range(2 * small.blocks_per_step)])
    record = as_record(counted, syncs, config, arguments.card)
    if arguments.json:
        words = ["tools/count_kernels.py", *(sys.argv[1:] if argv is None else argv)]
        write_record(arguments.json, words, ("torch", "timm"), **record)
    _print(record)
    return EXIT_DONE


def _print(record: Mapping[str, Any]) -> None:
    print(f"{'part':<28} {'kernels':>8} {'casts':>7} {'GB':>8} {'TFLOP':>7} {'bound, ms':>10}")
    for name, part in [*record["parts"].items(), ("whole step", record)]:
        print(
            f"{name:<28} {part['kernels']:>8,} {part['casts']:>7,} {part['bytes'] / 1e9:>8.2f} "
            f"{part['flop'] / 1e12:>7.2f} {part['roofline_ms']:>10.2f}"
        )
    print(f"saved for the backward: {record['saved_bytes'] / 2**30:.2f} GiB; the bound is that of one {record['card']}")
    print(
        f"the host waits for the device at {record['host_syncs']}: {', '.join(record['host_sync_places']) or 'nowhere'}"
    )
