"""Federated self-supervised pretraining for medical images: the scans stay, one encoder travels."""

import os

__version__ = "0.1.0"
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MONAI imports MLflow where it is installed
