"""How a sentence-transformers folder makes one vector of a text: prompt, tokens, encoder, pooling, normalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import cached_file

from ..core.arguments import show
from ..core.errors import SensibertError, first_line
from ..core.json_text import parse_json

POOLINGS = ("mean", "cls", "max")
MODULES, LENGTHS, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
# Of versions before 6: one switch for each mode.
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
WANTED = "want Transformer, Pooling and perhaps Normalize, with pooling mean, cls or max"


@dataclass(frozen=True)
class Pooling:
    """mode: one of POOLINGS. normalize: embeddings have length 1. prompts: put before a text, one of them; ("",) for
    none. max_length: in tokens, None if the folder does not say. lower_case: of the text, before it is tokenized."""

    mode: str = "mean"
    normalize: bool = False
    prompts: tuple[str, ...] = ("",)
    max_length: int | None = None
    lower_case: bool = False

    def __call__(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states [B, S, H] and their mask [B, S] -> embeddings [B, H]. Without a mask all tokens count."""
        if self.mode == "cls":
            pooled = hidden[:, 0]
        elif attention_mask is None:
            pooled = hidden.mean(1) if self.mode == "mean" else hidden.amax(1)
        else:
            real = attention_mask[:, :, None]
            if self.mode == "mean":
                pooled = (hidden * real).sum(1) / real.sum(1).clamp(min=1)
            else:
                pooled = hidden.masked_fill(real == 0, torch.finfo(hidden.dtype).min).amax(1)
        return F.normalize(pooled, dim=-1) if self.normalize else pooled


def read_pooling(source: str, argument: str = "model") -> Pooling:
    """Of a local folder or a model on the hub; mean without normalization if it has no modules.json.

    SensibertError, naming the argument, for a file that cannot be read, a module other than Transformer, Pooling and
    Normalize, and a pooling other than mean, cls and max."""
    modules = _read(source, MODULES, argument)
    if modules is None:
        return Pooling()
    place = f"{argument}: {source}, {MODULES}"
    typed = isinstance(modules, list) and all(isinstance(m, dict) and isinstance(m.get("type"), str) for m in modules)
    if not typed:
        raise SensibertError(f"{place} is {show(modules)}, want a list of modules with their types")
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise SensibertError(f"{place} has the modules {', '.join(kinds) or 'none'}; {WANTED}")
    if inside := modules[0].get("path"):
        raise SensibertError(f"{place} has its Transformer in {inside}, want it in the folder itself")
    inside = modules[1].get("path", "")
    if not isinstance(inside, str) or ".." in inside.split("/"):
        raise SensibertError(f"{place} has its Pooling in {show(inside)}, want the name of a folder")
    path = f"{inside}/config.json".lstrip("/")
    pooling, lengths = _object(source, path, argument), _object(source, LENGTHS, argument)
    if pooling is None:
        raise SensibertError(f"{argument}: {source} has no {path}, which its {MODULES} names; {WANTED}")
    prompts = _prompts(_object(source, PROMPTS, argument) or {}, f"{argument}: {source}, {PROMPTS}")
    if prompts != ("",) and not pooling.get("include_prompt", True):
        raise SensibertError(f"{argument}: {source}, {path} has include_prompt false; want one that pools all tokens")
    longest = (lengths or {}).get("max_seq_length")
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int) or longest < 1):
        raise SensibertError(
            f"{argument}: {source}, {LENGTHS} has max_seq_length {show(longest)}, want a number of tokens"
        )
    return Pooling(
        _mode(pooling, f"{argument}: {source}, {path}"),
        "Normalize" in kinds,
        prompts,
        longest,
        bool((lengths or {}).get("do_lower_case")),
    )


def _mode(config: dict[str, Any], place: str) -> str:
    modes = config.get("pooling_mode", [mode for switch, mode in _SWITCHES.items() if config.get(switch)] or "mean")
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in POOLINGS:
        came = " and ".join(map(str, modes)) if isinstance(modes, list) else show(modes)
        raise SensibertError(f"{place} has the pooling {came}; want mean, cls or max")
    mode: str = modes[0]
    return mode


def _prompts(config: dict[str, Any], place: str) -> tuple[str, ...]:
    """The default prompt if there is one, else all different ones."""
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    if not isinstance(prompts, dict) or not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise SensibertError(f"{place} has the prompts {show(prompts)}, want an object of texts")
    if default is not None:
        if default not in prompts:
            known = ", ".join(prompts) or "none"
            raise SensibertError(f"{place} has default_prompt_name {show(default)}, want one of its prompts ({known})")
        return (prompts[default],)
    return tuple(dict.fromkeys(prompts.values())) or ("",)


def _object(source: str, name: str, argument: str) -> dict[str, Any] | None:
    content = _read(source, name, argument)
    if content is not None and not isinstance(content, dict):
        raise SensibertError(f"{argument}: {source}, {name} is {show(content)}, want an object")
    return content


def _read(source: str, name: str, argument: str) -> Any:
    """The content of a JSON file of the folder; None if there is no such file."""
    try:
        file = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if file is None:
            return None
        with open(file, encoding="utf-8") as text:
            return parse_json(text.read())
    except (OSError, ValueError) as error:
        raise SensibertError(f"{argument}: {source}, {name} cannot be read ({first_line(error)})") from None
