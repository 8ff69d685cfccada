"""Secure aggregation: the server learns sums over many sites, and nothing else of updates (Bonawitz et al. 2017)."""
