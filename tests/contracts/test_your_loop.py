"""The two loops of docs/your_loop.md run as they are printed, and train every part."""

from __future__ import annotations

import re
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.helpers.runs import REPOSITORY


def printed(heading: str) -> str:
    """Return the first block of code below a heading, with a teacher that is sure: random weights reach no .968."""
    text = (REPOSITORY / "docs/your_loop.md").read_text(encoding="utf-8")
    found = re.search(rf"## {heading}.*?```python\n(.*?)```", text, flags=re.DOTALL)
    assert found is not None
    assert "0.968" in found[1]
    return found[1].replace("0.968", "0.0")


def two_batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(2):
        source, target = torch.rand(2, 1, 3, 64, 64, generator=generator)
        batches.append((source, torch.randint(0, 19, (1, 64, 64), generator=generator), target))
    return batches


def moved(before: dict[str, Tensor], module: nn.Module) -> bool:
    """Tell whether every parameter moved by more than its decay: 3e-5 of the rate a step, of weights near 0.1."""
    names = [name for name, _ in module.named_parameters() if "aux" not in name]
    after = dict(module.named_parameters())
    return all(float((after[name] - before[name]).abs().max()) > 1e-6 for name in names)


def test_the_twenty_lines_train_student_and_rebuilder_and_the_teacher_follows() -> None:
    code = printed("Twenty lines with torchvision")
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 22
    start, loop = code.split("\nfor ", maxsplit=1)
    names: dict[str, Any] = {"loader": two_batches()}
    exec(start, names)
    student, rebuilder, teacher = (names[name] for name in ("student", "rebuilder", "teacher"))
    before = [{name: p.detach().clone() for name, p in part.named_parameters()} for part in (student, rebuilder)]
    exec(f"for {loop}", names)
    assert moved(before[0], student)
    assert moved(before[1], rebuilder)
    weight = "backbone.conv1.weight"
    way = (teacher.get_parameter(weight) - before[0][weight]).norm() / (
        student.get_parameter(weight) - before[0][weight]
    ).norm()
    assert 0.0005 < way < 0.003  # two updates of a thousandth


def test_the_lightning_module_trains(tmp_path: Any) -> None:
    names: dict[str, Any] = {}
    exec(printed("A Lightning module"), names)
    module = names["MFM"]()
    before = {name: p.detach().clone() for name, p in module.rebuilder.named_parameters()}
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    batches = two_batches()
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert moved(before, module.rebuilder)
    assert float(trainer.callback_metrics["mfm"]) > 0
