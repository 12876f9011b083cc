"""Rewards that are functions of the pixels, without weights, and how they read a picture."""

from rewards.pixels.reading import LARGEST, PixelReward, drawing, ink, luma, read, rms

__all__ = ["LARGEST", "PixelReward", "drawing", "ink", "luma", "read", "rms"]
