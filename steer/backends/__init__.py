"""Pretrained models of other libraries seen as flow maps, one family a file.

The only room that imports diffusers, and only where a model is made.
"""
