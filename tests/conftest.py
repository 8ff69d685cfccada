"""For all tests."""

import torch

torch.set_num_threads(1)  # tensors here are small: a second thread costs more than it brings, most of all under load
