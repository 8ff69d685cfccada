"""Simulated sites in worker processes of this machine, which share tensors with the server in memory."""
