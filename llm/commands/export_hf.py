"""python -m llm export-hf RUN FOLDER: a Hugging Face GPT-2, Llama or Mixtral of a checkpoint.

Writes config.json and model.safetensors, which transformers' from_pretrained opens with the same
logits, and tokenizer/, which import-hf reads. The model must be exactly one of these families: a
run of the defaults is a GPT-2, and a message names each setting that keeps a run from being one.
The tokenizer is not converted; transformers has GPT-2's under the name "gpt2".
"""

import json
from pathlib import Path

from llm.commands.flags import argument, parse
from llm.commands.import_hf import new_folder
from llm.commands.shared import RunOptions
from llm.console import say
from llm.section import setting


class Options(RunOptions):
    """The command line."""

    folder: str = argument("FOLDER", "folder to make")
    as_json: bool = setting(False, "print what was made as one JSON object", flag="json")


def main(arguments: list[str]) -> int:
    """Exit codes as in docs/design.md; errors are raised as LLMError."""
    options = parse(Options, arguments)
    opened = options.open()

    from llm.interop.hf import to_hf

    tokenizer = opened.tokenizer
    with new_folder(Path(options.folder), Path(options.run)) as partial:
        spec, end_of_text = opened.spec, tokenizer.end_of_text
        model_type = to_hf(spec.config, spec.vocab_size, opened.params, partial, end_of_text)
        tokenizer.save(partial / "tokenizer")
    if options.as_json:
        print(json.dumps({**opened.checkpoint, "folder": options.folder, "model_type": model_type}))
    say(
        f"{options.folder} holds step {opened.step} of {opened.run} as a {model_type} model; open "
        f"it: transformers.AutoModelForCausalLM.from_pretrained({options.folder!r})"
    )
    return 0
