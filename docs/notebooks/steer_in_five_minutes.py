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
# # Steer in five minutes
#
# A model makes a picture, a reward scores it, and guidance changes the sampling so that the score
# rises. Everything here runs on a CPU, offline.

# %%
import steer

flow = steer.load("emoji")  # a small text-to-image flow map
flow

# %% [markdown]
# ## Without guidance
#
# `none` jumps from noise to a picture. The number under a picture is its reward.

# %%
reward = "clip + 0.5*colour:name=red"
run = {"prompts": "a bird", "reward_prompts": "a red bird", "particles": 6, "steps": 6}
plain = steer.sample(flow, reward, method="none", **run)
plain

# %% [markdown]
# ## With guidance
#
# The same noise. At every step the model computes the clean picture at which the current state
# would end (the *lookahead*). The reward scores it, and its gradient moves the state a little.

# %%
guided = steer.sample(flow, reward, method="fmrg-j", **run)
guided

# %%
print(f"unguided {plain.rewards.mean():.3f} at {plain.nfe:g} network calls per picture")
print(f"guided   {guided.rewards.mean():.3f} at {guided.nfe:g}")

# %% [markdown]
# ## The lookaheads
#
# A `Film` records the lookaheads. Time goes from left to right.

# %%
films = {"unguided": steer.Film(flow, "a bird"), "guided": steer.Film(flow, "a bird")}
for film, method in zip(films.values(), ("none", "fmrg-j"), strict=True):
    steer.sample(flow, reward, method=method, callback=film, **run)
steer.filmstrip(films)

# %% [markdown]
# ## Comparison at equal cost
#
# Best-of-n is the baseline that needs no gradient: generate many pictures, keep the best. Here it
# gets as many network calls as guidance used.

# %%
calls = guided.nfe * guided.rewards.numel()
many = steer.sample(
    flow, reward, method="best-of-n", **{**run, "steps": 1, "particles": int(calls)}
)
print(f"best of {int(calls)}: {many.rewards.max():.3f}; best guided: {guided.rewards.max():.3f}")
