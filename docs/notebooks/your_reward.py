# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     name: python3
#     display_name: Python
# ---

# %% [markdown]
# # Your reward
#
# A reward is a function of images `(n, 3, h, w)` in [0, 1]. It returns one number per picture;
# higher is better.

# %%
import torch

import rewards
import steer


def framed(images):
    """High for a dark middle on a light border."""
    middle = images[..., 8:24, 8:24].mean((1, 2, 3))
    border = torch.cat([images[..., :4, :].flatten(1), images[..., -4:, :].flatten(1)], 1).mean(1)
    return border - middle


flow = steer.load("emoji")
result = steer.sample(flow, framed, "animal", particles=6, steps=6)
result

# %% [markdown]
# ## Check the reward
#
# Two mistakes are common: a gradient that does not reach the picture, and a reward that is high
# for noise. For the first, compare the gradient with finite differences. `steer check-reward
# file.py:Name` does this and more for a reward in a file.

# %%
images = torch.rand(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
(slope,) = torch.autograd.grad(framed(images).sum(), images)
step = torch.randn_like(images)
difference = (framed(images + 1e-4 * step) - framed(images - 1e-4 * step)).sum() / 2e-4
print(f"by finite differences {difference.item():.6f}, by the gradient {(slope * step).sum():.6f}")

# %% [markdown]
# ## A reward without gradient
#
# A black box works as well, with a method that needs no gradient.

# %%


def few_colours(images):
    """Count how many different colours a picture has; fewer are better."""
    coarse = (images * 7).round().flatten(2).long()
    codes = coarse[:, 0] * 64 + coarse[:, 1] * 8 + coarse[:, 2]
    return torch.tensor([-float(len(set(row.tolist()))) for row in codes])


simple = steer.sample(
    flow, rewards.wrap(few_colours, differentiable=False), "food", particles=8, steps=4,
    method="svdd",
)  # fmt: skip
simple

# %% [markdown]
# ## Two rewards at once
#
# Rewards can be added. `normalised` first brings them to the same scale.

# %%
both = rewards.load("normalised(clip) + normalised(saturation)")
steer.sample(flow, both, "fruit", particles=6, steps=6)
