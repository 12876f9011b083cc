"""Reward fine-tuning of adapters with Lightning."""
