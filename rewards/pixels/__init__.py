"""Rewards of the pixels themselves, without weights; how they see and read a picture."""

from rewards.pixels.reading import LARGEST, PixelReward, drawing, ink, luma, read, rms

__all__ = ["LARGEST", "PixelReward", "drawing", "ink", "luma", "read", "rms"]
