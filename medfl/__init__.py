"""Federated self-supervised pretraining for medical images: the scans stay, one encoder travels."""

import os

__version__ = "0.1.0"
PROTOCOL = 2  # of the messages between server and sites; a change that an older release would misread raises it
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MONAI imports MLflow where it is installed
