"""Federated self-supervised pretraining for medical images: the scans stay, one encoder travels."""

__version__ = "0.1.0"
