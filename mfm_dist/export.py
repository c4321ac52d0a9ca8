"""Take the trained segmentor out of a run: mfm-export --run RUN --output FOLDER

The folder holds model.safetensors and config.json, without the Rebuilder, and a model card, README.md, whose terms are
yours to fill in; `mfm_dist.load(FOLDER)` gives the network. It appears whole or not at all, and takes the place of an
earlier export only. --push also uploads it to the Hugging Face Hub, which has not been tried.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save

from mfm_dist.errors import EXIT_DONE, ConfigError, StorageError, first_line, tell_user_errors
from mfm_dist.inference.open_run import open_run
from mfm_dist.inference.readme import readme_text
from mfm_dist.inference.segmentor import CONFIG, ONNX, README, WEIGHTS, TrainedSegmentor, is_export
from mfm_dist.storage import whole_folder


@tell_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = parse_arguments(argv)
    output: Path = arguments.output
    refuse_what_is_no_export(output)
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if arguments.onnx and missing:
        raise ConfigError(f"--onnx needs {' and '.join(missing)}: pip install onnx onnxscript")
    if arguments.push and find_spec("huggingface_hub") is None:
        raise ConfigError("--push needs huggingface_hub: pip install huggingface_hub")
    run = open_run(arguments.run, arguments.weights)
    model, readme = run.model, readme_text(run.model.card, run.config, run.scores)
    write_export(model, output, readme, onnx=arguments.onnx)
    card, parameters = model.card, sum(p.numel() for p in model.parameters())
    miou = "" if card.miou is None else f", target mIoU {card.miou:.2f} %"
    print(f"{output}: {card.weights} of {card.run} at step {card.step}{miou}, {parameters / 1e6:.2f} M parameters")
    print(f"load it with: mfm_dist.load({str(output)!r})")
    if arguments.push:
        print(f"uploaded: {push(output, arguments.push, private=not arguments.public)}")
    return EXIT_DONE


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload an export to a repository of the Hugging Face Hub, made if need be; return its address.

    Raises:
        ConfigError: whatever keeps it from that. The folder is whole.
    """
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        hub.create_repo(repository, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=folder))
    except Exception as error:  # names, logins, network: each is an error of another kind
        raise ConfigError(
            f"--push {repository}: could not be uploaded ({type(error).__name__}: {first_line(error)}). The export in "
            f"{folder} is whole; log in with `hf auth login`, or leave --push out"
        ) from error


def write_export(model: TrainedSegmentor, output: Path, readme: str, *, onnx: bool = False) -> None:
    """Write an export folder, with the text of its README.md, in place of an earlier one if there is one.

    Raises:
        StorageError: if the folder cannot be written. An earlier export is then intact.
        ConfigError: if ``onnx`` is asked for and torch cannot trace this network.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(output) as folder:
            # Copies, because safetensors refuses tensors that share memory.
            tensors = {name: tensor.detach().cpu().clone() for name, tensor in model.segmentor.state_dict().items()}
            (folder / WEIGHTS).write_bytes(save(tensors))  # save_file would keep it from other users
            (folder / CONFIG).write_text(model.card.to_json(), encoding="utf-8")
            (folder / README).write_text(readme, encoding="utf-8")
            if onnx:
                _write_onnx(model, folder / ONNX)
    except OSError as error:
        raise StorageError(f"--output {output} cannot be written: {error}") from error


def _write_onnx(model: TrainedSegmentor, path: Path) -> None:
    """Write normalised images to logits as ONNX, at any batch size and sides from 64; its metadata hold config.json.

    A segmentor that predicts in windows takes windows: images of exactly their size. So does a plain vision
    transformer take training crops: torch's exporter fixes sizes where an image is padded to whole patches (2.15).
    """
    side = torch.export.Dim
    sizes = {0: side("batch")}
    if model.segmentor.window is None and model.segmentor.backbone.multiple == 1:
        sizes |= {2: side("height", min=64), 3: side("width", min=64)}
    try:
        program = torch.onnx.export(
            model,
            (torch.zeros(2, 3, *model.card.crop),),
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes={"image": sizes},
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # torch's exporter raises many kinds
        failed = f"torch cannot export {model.card.backbone} ({first_line(error)})"
        raise ConfigError(f"--onnx: {failed}; leave --onnx out") from error
    assert program is not None
    program.model.metadata_props["mfm_dist"] = model.card.to_json()
    program.save(path)


def refuse_what_is_no_export(output: Path) -> None:
    """Keep other people's files.

    Raises:
        ConfigError: if ``output`` is there and is neither empty nor an export and nothing else.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise ConfigError(f"--output {output}: there is a file of that name; choose another")
    if any(output.iterdir()) and not is_export(output):
        raise ConfigError(f"--output {output}: holds other files than an export's; choose another folder")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="mfm-export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="run folder; its newest checkpoint is taken")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="new folder, or an earlier export")
    parser.add_argument(
        "--weights",
        choices=("student", "teacher"),
        default="student",
        help="student, which evaluation scores (default), or its moving average, the EMA teacher",
    )
    parser.add_argument("--onnx", action="store_true", help="also model.onnx (needs the packages onnx and onnxscript)")
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload it to the Hugging Face Hub, private (not tried yet)"
    )
    parser.add_argument("--public", action="store_true", help="for everybody to see, if --push makes the repository")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
