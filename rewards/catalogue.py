"""All rewards, each with a one-line description and its place in the code. Does not need torch."""

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["FUNCTIONS", "FUNCTION_PLACES", "GROUP", "NAMES", "PLACES"]

PLACES = {
    "clip": (
        "models.clip:Clip",
        "cosine similarity of picture and prompt, by an open_clip model",
    ),
    "colour": ("pixels.colour:Colour", "closeness of the drawing to a named colour (name=red)"),
    "brightness": ("pixels.colour:Brightness", "mean luma, from 0 (black) to 1 (white)"),
    "contrast": ("pixels.tone:Contrast", "standard deviation of luma, from 0 to 0.5"),
    "saturation": ("pixels.tone:Saturation", "mean chroma of the drawing, from 0 to 1"),
    "sharpness": ("pixels.tone:Sharpness", "RMS Laplacian of luma, from 0 to 1"),
    "smoothness": ("pixels.tone:Smoothness", "minus the total variation, from -1 to 0"),
    "symmetry": (
        "pixels.form:Symmetry",
        "similarity of the two halves, from -1 to 0 (axis=vertical or horizontal)",
    ),
    "antisymmetry": (
        "pixels.form:Antisymmetry",
        "how far each half is the other's negative, from 0 to 1 (axis=vertical or horizontal)",
    ),
    "layout": (
        "pixels.form:Layout",
        "fraction of the ink inside region=left, right, top, bottom, centre, or inside mask=FILE",
    ),
    "similarity": (
        "pixels.reference:Similarity",
        "closeness to the picture image=FILE, from -1 to 0 (by=colour or luma)",
    ),
    "inpaint": (
        "pixels.measurement:Inpainting",
        "log-likelihood of image=FILE where mask=FILE is white, noise sd=",
    ),
    "upscale": (
        "pixels.measurement:SuperResolution",
        "log-likelihood of the small picture image=FILE, factor=, noise sd=",
    ),
    "deblur": (
        "pixels.measurement:Deblurring",
        "log-likelihood of a blurred image=FILE, width=, noise sd=",
    ),
    "jpeg": ("pixels.jpeg:Jpeg", "minus the size as a JPEG file in kB; no gradient"),
    "siglip": ("models.siglip:Siglip", "cosine of picture and prompt by SigLIP 1 or 2"),
    "pickscore": (
        "models.pickscore:PickScore",
        "human preference for a picture, given a prompt; about 16 to 26",
    ),
    "hpsv2": (
        "models.hpsv2:HPSv2",
        "human preference for a picture, given a prompt; about .2 to .35 (version=2.1 or 2.0)",
    ),
    "imagereward": (
        "models.imagereward:ImageReward",
        "human rating of a picture and its fit to the prompt; about -2.5 to 2.5",
    ),
    "mps": (
        "models.mps:MPS",
        "human preference for a picture, given a prompt and a criterion",
    ),
    "aesthetic": (
        "models.aesthetic:Aesthetic",
        "LAION's aesthetic score, about 1 to 10; needs no prompt",
    ),
    "vqa": (
        "models.vqa:VQA",
        "log-probability of an answer about the picture, by a vision-language model",
    ),
    "classifier": (
        "models.classifier:Classifier",
        "log-probability of a class (model=timm:NAME or torchvision:NAME, target=)",
    ),
    "fashion": (
        "models.fashion:Fashion",
        "log-probability of a kind of clothes, by a small classifier of Fashion-MNIST (target=)",
    ),
    "lpips": ("models.lpips:Lpips", "minus the perceptual distance to image=FILE"),
    "dino": ("models.dino:Dino", "cosine of self-supervised features with those of image=FILE"),
    "remote": ("serving.remote:Remote", "score of a reward server (url=http://HOST:PORT)"),
}
"""Name -> module:class in this package, and one line."""

NAMES: Mapping[str, str] = MappingProxyType({name: line for name, (_, line) in PLACES.items()})
"""Name -> one line."""

GROUP = "flowsteer.rewards"
"""The entry-point group in which other packages offer rewards."""

FUNCTION_PLACES = {
    "min": ("combine.algebra:Minimum", "the smallest of several rewards (smooth=WIDTH)"),
    "product": (
        "combine.algebra:Product",
        "log-probability that all rewards accept (at=, width=)",
    ),
    "capped": (
        "combine.algebra:Capped",
        "a reward that does not grow beyond a target (at=, soft=)",
    ),
    "ensemble": (
        "combine.algebra:Ensemble",
        "the mean minus a penalty on the disagreement (penalty=)",
    ),
    "placed": ("combine.placed:Placed", "on its own device (device=cuda:1)"),
    "normalised": (
        "combine.normalised:Normalised",
        "standardised by the scores of the run (decay=)",
    ),
    "augmented": (
        "combine.augment:Augmented",
        "the mean over random crops, flips and noise (views=, crop=, flip=, noise=, seed=)",
    ),
    "batched": ("combine.algebra:Batched", "in micro-batches, to save memory (size=)"),
}
"""The same for rewards that combine rewards."""

FUNCTIONS: Mapping[str, str] = MappingProxyType(
    {name: line for name, (_, line) in FUNCTION_PLACES.items()}
)
"""Functions of rewards, as in `min(clip, 2*brightness)`: name -> one line."""
