"""Plain-text docstrings -> Markdown for the API pages: an extension of griffe that mkdocs.yml names.

Docstrings here are sentences, `name: what it is.` for an argument, and shapes such as x [N, K]. So that Markdown reads
them as they are meant, its special characters are escaped outside backticks; arguments become a list.
"""

import re

try:
    from griffe import Extension
except ImportError:  # where only `markdown` is needed
    Extension = object

RAISES = re.compile(r"(?<=[.:)] )(?=\w*Error\b)|\n(?=\w*Error\b)")  # a sentence about an exception
CODE = re.compile(r"(`[^`]*`)")


def markdown(text: str, names: set[str]) -> str:
    """text with a list item for each sentence that begins with some of names and a colon."""
    parts = CODE.split(text)
    parts[::2] = [re.sub(r"([\\*_\[\]<>|])", r"\\\1", part) for part in parts[::2]]
    text = RAISES.sub("\n\n", "".join(parts))
    known = "|".join(re.escape(name).replace("_", r"\_") for name in sorted(names, key=len, reverse=True))
    known = known.replace(r"\_", r"\\_")
    if names:
        begins = rf"(?:(?<=[.;:)`] )|(?<=\.\n)|^)((?:{known})(?:(?:, | and )(?:{known}))*):(?=\s)"
        text = re.sub(begins, r"\n\n- **\1**:", text, flags=re.MULTILINE)
    return text


class PlainDocstrings(Extension):
    """Applies `markdown` to every docstring that griffe has collected."""

    def on_object(self, *, obj, **kwargs) -> None:
        if obj.docstring:
            own = set(obj.members) if obj.is_class else set()
            function = obj.members.get("__init__") if obj.is_class else obj
            own |= {parameter.name for parameter in getattr(function, "parameters", ())}
            obj.docstring.value = markdown(obj.docstring.value, own)
