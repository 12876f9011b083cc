"""Pretrained models of other libraries seen as flow maps, one family a file. None is here yet.

The only room that imports diffusers, and only inside the function that makes a model. A family is
a `FlowMap` that says what it is: `path` and `event_shape`; `kind` ("two-time", "one-jump" or
"velocity"); `velocity` and `jump`, or a `steer.OneTime` that makes both of one prediction; `given`
(encode the prompts once), `decode` and `encode` (its autoencoder); `denoiser` (the module that
adapters go to); `times` and `churn` (its own grid and re-noising); `calls` where a jump takes
several. `steer.models.loading.load` chooses it by what it is given; its test inherits the contract
of its kind from `steer.testing`, on a tiny checkpoint of the real class.
"""
