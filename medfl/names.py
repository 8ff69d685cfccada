"""Names with a meaning of their own in the files of a run."""

ARMS = ("random", "local", "federated", "central")  # in transfer.csv beside the sites, so no site may be called so
