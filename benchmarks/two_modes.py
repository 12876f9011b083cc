"""Two Gaussians in the plane and a linear reward, whose tilt has a closed form.

steer compare --model benchmarks/two_modes.py:mixture --reward benchmarks/two_modes.py:right ...
"""

import torch

import steer

__all__ = ["mixture", "right"]

mixture = steer.GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.4)
right = steer.LinearReward(torch.tensor([1.0, 0.0]))
