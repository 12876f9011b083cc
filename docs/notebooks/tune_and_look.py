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
# Guidance pays for the reward with every picture. Tuning pays once: a low-rank adapter (LoRA)
# moves the model's own samples. Then one network call is enough.

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
# Twelve steps show that it works; a real run has some hundreds.
#
# ## The scale is a dial
#
# At scale 0 the model is its base bit for bit. At 1 it is what was tuned.

# %%
tuned.at(0.5)

# %% [markdown]
# ## What it cost
#
# `front.png` in the run folder shows reward against diversity and distance to the base, at several
# scales of the adapters. A number in the plot is a scale. A ring marks an alarm: a statistic of
# the pictures, such as their brightness, has moved too far from the base's. The recommended scale
# is one without an alarm.

# %%
from PIL import Image  # noqa: E402

Image.open("runs/blue/front.png")

# %% [markdown]
# ## Use it
#
# The adapters are a folder. `steer.load` puts them on the base again, and guidance works on top.

# %%
again = steer.load("emoji", lora="runs/blue", lora_scale=0.8)
steer.sample(again, "clip", ["bird", "fruit"], particles=3, steps=1, method="none")
