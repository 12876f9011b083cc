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
# # Tune and look
#
# Guidance costs extra network calls for every picture. Tuning costs them once: it trains a
# low-rank adapter (LoRA) that changes the model's own samples. Then one network call is enough.

# %%
import steer

flow = steer.load("emoji")
prompts = ["animal", "bird", "face", "food", "fruit", "plant"]
tuned = steer.finetune(
    flow, "colour:name=royalblue", prompts, objective="direct", steps=12, batch_size=6, rank=4,
    learning_rate=4e-3, warm=2, strength=30, out="runs/blue", check_every=12, check_samples=2,
    sweep=[0.0, 0.5, 1.0], sweep_steps=[1], precision="32-true", progress=False,
)  # fmt: skip
tuned  # the same noise: base above, tuned below

# %% [markdown]
# Twelve steps show that it works; a real run has several hundred.
#
# ## The scale of the adapter
#
# At scale 0 the model equals its base bit for bit. At 1 it is the tuned model. Values in between
# interpolate.

# %%
tuned.at(0.5)

# %% [markdown]
# ## What the reward costs in diversity
#
# `front.png` in the run folder shows reward against diversity and distance to the base, at several
# scales of the adapters. The numbers in the plot are the scales. A ring marks an alarm: a
# statistic of the pictures, such as their brightness, has moved too far from that of the base. The
# recommended scale has no alarm.

# %%
from PIL import Image  # noqa: E402

Image.open("runs/blue/front.png")

# %% [markdown]
# ## Use it
#
# The adapters are saved in a folder. `steer.load` adds them to the base again. Guidance can be
# used with them.

# %%
again = steer.load("emoji", lora="runs/blue", lora_scale=0.8)
steer.sample(again, "clip", ["bird", "fruit"], particles=3, steps=1, method="none")
