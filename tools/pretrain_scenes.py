#!/usr/bin/env python
"""Pre-train an encoder on the scenes' object-centred domain: python tools/pretrain_scenes.py --output DIR/NAME

Plays the part that ImageNet plays for the paper, where nothing can be downloaded: image labels, no pixel labels, and
pictures that share neither domain's look. Writes NAME.safetensors (half precision, for model.weights) and NAME.json,
the recipe with the file's SHA-256. About ten minutes on two CPU cores with the defaults.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from mfm_dist.errors import tell_user_errors
from mfm_dist.models.backbone import build_classifier
from mfm_dist.models.preprocessing import normalise
from mfm_dist.scenes import OBJECT_KINDS, render_object
from mfm_dist.storage import write_atomically

SCALE = (0.7, 1.1)
"""Range of the side of a random crop, over the image's side."""
LABEL_SMOOTHING = 0.1
"""Share of the target that is spread over all kinds."""
WEIGHT_DECAY = 0.05
"""AdamW's decoupled decay."""


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = parse_arguments(argv)
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    model = build_classifier(arguments.backbone, len(OBJECT_KINDS))
    started = time.perf_counter()
    images, labels = render(arguments, "train", arguments.images)
    print(f"rendered {len(images)} images in {time.perf_counter() - started:.0f} s", flush=True)
    test_images, test_labels = render(arguments, "val", arguments.val)
    train(model, images, labels, arguments)
    accuracy = score(model, test_images, test_labels)
    print(f"accuracy on {len(test_images)} new images: {accuracy:.1%} (chance {1 / len(OBJECT_KINDS):.1%})")
    save(model, accuracy, time.perf_counter() - started, arguments)
    return 0


def render(arguments: argparse.Namespace, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Render images uint8 [count, 3, size, size] and kinds int64 [count]."""
    size = (arguments.size, arguments.size)
    draw = partial(render_one, seed=arguments.seed, split=split, size=size)
    with ProcessPoolExecutor(arguments.threads, mp_context=get_context("spawn")) as pool:
        images, kinds = zip(*pool.map(draw, range(count), chunksize=64), strict=True)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(kinds)


def render_one(index: int, *, seed: int, split: str, size: tuple[int, int]) -> tuple[np.ndarray, int]:
    """Render one picture as plain values, for another process to return."""
    picture = render_object(seed=seed, split=split, index=index, size=size)
    return picture.image, picture.kind


def train(model: nn.Module, images: Tensor, labels: Tensor, arguments: argparse.Namespace) -> None:
    """Train by AdamW with a one-cycle learning rate over random crops and mirror images."""
    steps = arguments.epochs * (len(images) // arguments.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.lr, total_steps=steps, pct_start=0.1)
    model.train()
    step, mean_loss, started = 0, 0.0, time.perf_counter()
    for epoch in range(arguments.epochs):
        order = torch.randperm(len(images))[: len(images) // arguments.batch * arguments.batch]
        for chosen in order.split(arguments.batch):
            logits = model(random_view(normalise(images[chosen])))
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            mean_loss += (loss.item() - mean_loss) / min(step, 100)
        left = (time.perf_counter() - started) / step * (steps - step)
        print(f"epoch {epoch + 1}/{arguments.epochs}  loss {mean_loss:.3f}  {left:.0f} s left", flush=True)


def random_view(image: Tensor) -> Tensor:
    """Crop each of [B, 3, H, W] at a scale and place of its own, mirror it half the time, and restore its size."""
    batch = len(image)
    side = torch.empty(batch, 1).uniform_(*SCALE)
    mirror = torch.randint(0, 2, (batch, 1)) * 2 - 1
    centre = (1 - side).abs() * torch.empty(batch, 2).uniform_(-1, 1)
    zero = torch.zeros_like(side)
    rows = [torch.cat([side * mirror, zero, centre[:, :1]], 1), torch.cat([zero, side, centre[:, 1:]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, padding_mode="reflection", align_corners=False)


@torch.no_grad()
def score(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose kind is found."""
    model.eval()
    hits = [model(normalise(x)).argmax(1).eq(y) for x, y in zip(images.split(100), labels.split(100), strict=True)]
    return float(torch.cat(hits).float().mean())


def save(model: nn.Module, accuracy: float, seconds: float, arguments: argparse.Namespace) -> None:
    """Write the weights at half precision, and the recipe."""
    path = arguments.output.with_suffix(".safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    recipe = {
        "backbone": arguments.backbone,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "accuracy": round(accuracy, 4),
        "kinds": OBJECT_KINDS,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "command": "python tools/pretrain_scenes.py " + " ".join(f"--{k} {v}" for k, v in vars(arguments).items()),
        "seconds": round(seconds),
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "packages": {name: version(name) for name in ("torch", "timm", "numpy")},
    }
    write_atomically(path.with_suffix(".json"), json.dumps(recipe, indent=1) + "\n")
    print(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="where to write, without an ending")
    parser.add_argument("--backbone", default="test_resnet", help="as model.backbone (default: %(default)s)")
    parser.add_argument("--images", type=int, default=16_000, help="training images (default: %(default)s)")
    parser.add_argument("--val", type=int, default=1_000, help="images to score (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of an image in pixels (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=14, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--lr", type=float, default=6e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores to use")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
