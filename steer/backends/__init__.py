"""Pipelines of diffusers seen as flow maps: the only room that imports diffusers.

`table` names the families, `flow_matching`, `two_time` and `noise_prediction` have the few lines
in which each differs from `pipeline`, which is velocity, jump, decode and encode. What a prompt
means is recorded from one call of the pipeline (`recording`, `conditions`, `source`,
`conditioned`). `generic` finds out what other classes are by watching them (`watching`,
`deducing`). `loading` opens folders, files and hub ids; `community` and `comfyui` read and write
others' LoRA names.

A new family is a class in one of the three files and a line in `table.FAMILIES`; its tiny pipeline
goes into `tests/tiny_pipelines.py`, and the tests of all families run on it.
"""
