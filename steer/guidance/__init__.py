"""Guided sampling: potentials, kernels, weights, resamplers, and the samplers that run them."""
