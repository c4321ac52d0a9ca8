"""Distributed training of Masked Feature Modeling (MFM) for domain-adaptive semantic segmentation."""

__version__ = "0.1.0"
