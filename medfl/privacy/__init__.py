"""Differential privacy of patients at a site: units, clipped gradients, noise, codebooks, accounting and the ledger."""
