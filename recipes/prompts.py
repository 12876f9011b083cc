"""Prompt files: a text file with a prompt a line, or JSON lines."""

import json
from pathlib import Path
from typing import NamedTuple

__all__ = ["Asked", "read_prompts"]


class Asked(NamedTuple):
    """Prompts, and what a reward is asked for each where the file says so."""

    prompts: list[str]
    reward_prompts: list[str] | None


def read_prompts(file: Path) -> Asked:
    """Read a file of prompts, UTF-8; blank lines are passed over.

    A `.jsonl` file has an object a line: "prompt" (or "text"), and "reward_prompt" if the reward
    is asked something else; other keys are left alone. Any other file has a prompt a line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no prompts in it, or a line that is not what it should be; names the line.
    """
    file = file.expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no prompts file at {file.absolute()}: give a text or jsonl file")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error.reason}): save it as UTF-8") from None
    found = [(i + 1, line.strip()) for i, line in enumerate(lines) if line.strip()]
    if not found:
        raise ValueError(f"{file} holds no prompts: put one on each line")
    if file.suffix.lower() != ".jsonl":
        return Asked([line for _, line in found], None)
    prompts, asked = [], []
    for number, line in found:
        try:
            entry = json.loads(line)
            prompt = entry["prompt"] if "prompt" in entry else entry["text"]
            question = entry.get("reward_prompt", prompt)
            if not (isinstance(prompt, str) and isinstance(question, str)):
                raise TypeError
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f'{file}, line {number}: {line[:60]!r} is no object with a "prompt": write '
                '{"prompt": "a red apple"} on each line'
            ) from None
        prompts.append(prompt)
        asked.append(question)
    return Asked(prompts, asked if asked != prompts else None)
