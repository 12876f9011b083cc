"""One thread: the arrays are small, and two threads cost more than they give."""

import torch

torch.set_num_threads(1)
