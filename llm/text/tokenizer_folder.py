"""The tokenizer of a folder of Hugging Face, and where texts begin and end by its settings.

    tokenizer.json          the tokenizer, else tokenizer.model (llm/text/sentencepiece.py)
    tokenizer_config.json   eos_token; for tokenizer.model also add_bos_token and bos_token, which
                            tokenizer.json has as its post-processor
    generation_config.json  eos_token_id: one end of text or several, else that of config.json
    config.json             vocab_size

What else tokenizer_config.json, special_tokens_map.json and chat_template.jinja say changes no id.
The tokenizer keeps it for an export.

Where the folder can be read in two ways, it is read as transformers 5 reads it.
"""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm.errors import UsageError
from llm.files import read_json, read_regular, why
from llm.text.described import parts_of
from llm.text.imported import ImportedTokenizer

# Files that are a tokenizer, the first one first.
FILES = ("tokenizer.json", "tokenizer.model", "spiece.model")

_EXPECTED = "expected a tokenizer.json, a sentencepiece .model, or a folder that has one of them"

# Names of an end of text, for a tokenizer that comes without a folder.
_ENDS_OF_TEXT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")

# What is kept for an export: nothing that changes an id.
_ROLES = ("pad", "unk", "sep", "cls", "mask")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_KEPT = ("padding_side", "truncation_side", "model_input_names")

_Json = dict[str, Any]


def open_tokenizer(path: Path, vocab_size: int = 0, *, lossy: bool = False) -> ImportedTokenizer:
    """The tokenizer of a tokenizer.json, a sentencepiece model or a folder of Hugging Face.

    Args:
      vocab_size: of the model that it is for; 0: what config.json says, or as many as
        there are tokens.
      lossy: take a tokenizer that loses text.
    Raises:
      UsageError: there is no such file, it is no tokenizer, or it loses text.
    """
    file = path
    if path.is_dir():
        file = next((path / name for name in FILES if (path / name).exists()), path / FILES[0])
    try:
        content = read_regular(file)
        if file.suffix == ".model":
            from llm.text.sentencepiece import as_tokenizer_json

            content = as_tokenizer_json(content)
        text = content.decode()
        settings, generation, config = (
            _settings(path / f"{name}.json") if path.is_dir() else {}
            for name in ("tokenizer_config", "generation_config", "config")
        )
        described = json.loads(text)
        tokens = {token["content"]: token["id"] for token in described.get("added_tokens") or ()}
        begin = begin_of(described)
        if file.suffix == ".model" and settings.get("add_bos_token"):
            begin = tokens.get(_spelling(settings, "bos"))
        stems = (path.resolve().parent.name, path.stem)
        tokenizer = ImportedTokenizer(
            path.resolve().name if path.is_dir() else stems[path.stem != "tokenizer"],
            text,
            vocab_size or config.get("vocab_size") or 0,
            begin,
            _ends(settings, generation, config, tokens),
            lossy,
        )
        tokenizer.settings = _kept(path, settings) if path.is_dir() else {}
        return tokenizer
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{file} is not a tokenizer ({error!r}); {_EXPECTED}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: {why(error)}; {_EXPECTED}") from None


def _settings(path: Path) -> _Json:
    """The object in a file of the folder; empty if there is none."""
    return read_json(path) if path.exists() else {}


def _kept(folder: Path, settings: _Json) -> _Json:
    """What else a folder says of its tokenizer, as transformers puts it together."""
    if "added_tokens_decoder" not in settings:  # the older files have it in this one
        settings = settings | _settings(folder / "special_tokens_map.json")
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    found = {name: read_regular(path).decode() for name, path in files.items() if path.exists()}
    template = found or settings.get("chat_template")
    if isinstance(template, list):
        template = {x["name"]: x["template"] for x in template}
    if isinstance(template, dict) and [*template] == ["default"]:
        template = template["default"]
    kept = {"chat_template": template, **{key: settings.get(key) for key in _KEPT}}
    # How tokens treat the spaces around them is in tokenizer.json.
    kept |= {f"{role}_token": _spelling(settings, role) for role in _ROLES}
    for key in _LISTS:
        names = settings.get(key) or ()
        kept[key] = [x if isinstance(x, str) else x["content"] for x in names] or None
    return {key: value for key, value in kept.items() if value}


def begin_of(described: _Json) -> int | None:
    """The id that a tokenizer.json puts before a text."""
    before: list[int] = []
    for part in parts_of(described.get("post_processor")):
        if part["type"] == "TemplateProcessing":
            members = itertools.takewhile(lambda member: "SpecialToken" in member, part["single"])
            names = [member["SpecialToken"]["id"] for member in members]
            before += [id_ for name in names for id_ in part["special_tokens"][name]["ids"]]
        elif part["type"] in ("BertProcessing", "RobertaProcessing"):
            before.append(part["cls"][1])
    if len(before) > 1:
        raise ValueError(f"it puts {len(before)} tokens before a text, expected one or none")
    return before[0] if before else None


def _ends(
    settings: _Json, generation: _Json, config: _Json, tokens: Mapping[str, int]
) -> tuple[int, ...]:
    """The ids that end a text: the tokenizer's own first, then those at which generation stops."""
    stops = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = [tokens.get(_spelling(settings, "eos")), *(stops if isinstance(stops, list) else [stops])]
    known = [id_ for id_ in ids if id_ is not None]
    return tuple(dict.fromkeys(known or [tokens[n] for n in _ENDS_OF_TEXT if n in tokens][:1]))


def _spelling(settings: _Json, role: str) -> str:
    """How tokenizer_config.json spells the token of a role: as a text, or as an object with one."""
    token = settings.get(f"{role}_token") or ""
    return token if isinstance(token, str) else token["content"]
