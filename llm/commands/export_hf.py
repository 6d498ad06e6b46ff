"""python -m llm export-hf RUN FOLDER: a Hugging Face model of a checkpoint: GPT-2, Llama, Qwen, ...

Writes what transformers' AutoModelForCausalLM, AutoTokenizer and pipeline open without a network:
the weights, the tokenizer, and where texts begin and end. The model must be exactly one of the
families of docs/models.md: a run of the defaults is a GPT-2, and a message names each setting that
keeps a run from being one. tokenizer/ is the run's own, which import-hf reads.
"""

import json
from pathlib import Path

from llm.commands.flags import argument, parse
from llm.commands.import_hf import new_folder
from llm.commands.shared import ExportOptions
from llm.console import say


class Options(ExportOptions):
    """The command line."""

    folder: str = argument("FOLDER", "folder to make")


def main(arguments: list[str]) -> int:
    """Exit codes as in docs/design.md; errors are raised as LLMError."""
    options = parse(Options, arguments)
    opened = options.open()

    from llm.interop.export_tokenizer import begin_and_ends, write_tokenizer
    from llm.interop.hf import to_hf

    spec, tokenizer = opened.spec, opened.tokenizer
    begin, _ = begin_and_ends(tokenizer)
    end = tokenizer.end_of_text
    with new_folder(Path(options.folder), Path(options.run)) as partial:
        model_type = to_hf(
            spec.config, spec.vocab_size, opened.params, partial, end, begin, options.dtype
        )
        write_tokenizer(tokenizer, partial, spec.config.context_length)
        tokenizer.save(partial / "tokenizer")
    if options.as_json:
        print(json.dumps({**opened.checkpoint, "folder": options.folder, "model_type": model_type}))
    say(
        f"{options.folder} holds step {opened.step} of {opened.run} as a {model_type} model; open "
        f"it: transformers.pipeline('text-generation', {options.folder!r})"
    )
    return 0
