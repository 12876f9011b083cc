"""Pipelines of diffusers as flow maps: the only package that imports diffusers.

`table` names the families. `pipeline` has velocity, jump, decode and encode, and `flow_matching`,
`two_time` and `noise_prediction` have the few lines in which each family differs. The conditioning
of a prompt is recorded from one call of the pipeline (`recording`, `conditions`, `source`,
`conditioned`). `generic` analyses other classes by observing them (`watching`, `deducing`).
`loading` opens folders, files and hub ids; `community` and `comfyui` read and write the LoRA names
of other programs.

A new family is a class in one of the three files and a line in `table.FAMILIES`; its tiny pipeline
goes into `tests/tiny_pipelines.py`, and the tests of all families run on it.
"""
