"""Completion of a reward's text while it is typed, in the browser."""

import json

from rewards.catalogue import FUNCTIONS, NAMES

__all__ = ["COMPLETE", "WORDS"]

WORDS = [*sorted(NAMES), *(f"{name}(" for name in sorted(FUNCTIONS))]
"""Possible beginnings of a term of a reward."""

COMPLETE = (
    """(text) => {
  // the name that is being typed: behind a sign, a weight, a bracket or a comma, or at the start
  const found = /(^|[-+*(,])\\s*([A-Za-z_]\\w*)?\\s*$/.exec(text);
  if (found === null) return [];
  const word = (found[2] ?? "").toLowerCase();
  let head = word ? text.slice(0, text.lastIndexOf(found[2])) : text.trimEnd();
  if (!word && /[-+,]$/.test(head)) head += " ";
  const words = """
    + json.dumps(WORDS)
    + """;
  const first = words.filter((name) => name.startsWith(word));
  const others = words.filter((name) => name.includes(word) && !name.startsWith(word));
  return [...first, ...others].map((name) => head + name);
}"""
)
"""A JavaScript function: a text -> complete texts in which the last name is an existing one.

The text before it, with weights and other terms, is kept. Names that start with the last word come
first, then those that contain it. A text that ends in an option has no completions. The browser
does this without the server, so answers cannot arrive out of order.
"""
