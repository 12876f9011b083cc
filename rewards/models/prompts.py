"""The prompts of a reward that compares pictures with texts."""

from collections.abc import Sequence

from torch import Tensor

__all__ = ["one_each"]


def one_each(images: Tensor, prompts: Sequence[str] | None, name: str) -> Sequence[str]:
    """Return the prompts, one per image.

    Args:
        images: (n, 3, h, w).
        prompts: n texts.
        name: name of the reward, for the message.

    Raises:
        ValueError: there are none, or not n of them; the message says what to give.
    """
    if prompts is None:
        raise ValueError(
            f"{name} compares a picture with a prompt, but there is no prompt: give prompts=..., "
            "or reward_prompts=... if the model takes no prompts (--reward-prompt on the command "
            "line)"
        )
    if isinstance(prompts, str) or len(prompts) != len(images):
        count = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise ValueError(
            f"{name} compares each picture with its own prompt, and got {count} for "
            f"{len(images)} images: give a list of {len(images)}"
        )
    return prompts
