"""The tokenizer over HTTP, as vLLM has it: what it is, text to token ids, and token ids to text.

    GET  /tokenizer_info    its class, sizes and special tokens
    POST /tokenize          {"prompt": TEXT}      ->  {"tokens": [...], "count", "max_model_len"}
    POST /detokenize        {"tokens": [...]}     ->  {"prompt": TEXT}

With these lm-evaluation-harness's `local-completions` needs no tokenizer of its own. The spelling
of a special token is ordinary text, as it is in a prompt, unless it is the whole text: that is how
clients ask for the id of a token in /tokenizer_info.

Source: https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html
"""

import contextlib
from typing import Any

from llm.errors import UsageError
from llm.inference.decode import encode_prompt
from llm.section import Section
from llm.serving.requests import TokenIdList, check_ids
from llm.text.tokenizer import Tokenizer


class Tokenize(Section):
    """A text to encode.

    Attributes:
      add_special_tokens: the beginning of text stands before it, if the tokenizer has one.
      special: special tokens that are written in it become those tokens.
    """

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    special: bool = False
    return_token_strs: bool = False

    def answer(self, tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
        """The body of the answer.

        Raises:
          UsageError: the tokenizer has no tokens for the text.
        """
        special = self.special or self.prompt in tokenizer.special_tokens
        encoded = tokenizer.encode(self.prompt, special=special)
        ids = (tokenizer.begun(encoded) if self.add_special_tokens else encoded).tolist()
        names = {"token_strs": [*map(tokenizer.token_name, ids)]} if self.return_token_strs else {}
        return {"count": len(ids), "max_model_len": context_length, "tokens": ids, **names}


class Detokenize(Section):
    """Token ids to decode; bytes that are not UTF-8 become U+FFFD."""

    tokens: TokenIdList
    model: str | None = None

    def answer(self, tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
        """The body of the answer.

        Raises:
          APIError: the tokenizer does not have one of the ids.
        """
        check_ids("tokens", self.tokens, tokenizer)
        return {"prompt": tokenizer.decode(self.tokens)}


# The path of each.
ASKED: dict[str, type[Tokenize] | type[Detokenize]] = {
    "/tokenize": Tokenize,
    "/detokenize": Detokenize,
}


def tokenizer_info(tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
    """The body of the answer, with the names of Hugging Face's tokenizer_config.json.

    `bos_token` is what a model's first text begins from: the end of text, or its substitute.
    """
    end, begin = tokenizer.end_of_text, None
    with contextlib.suppress(UsageError):  # it has neither
        begin = tokenizer.token_name(int(encode_prompt(tokenizer, "")[0]))
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "name": tokenizer.name,
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": context_length,
        "bos_token": begin,
        "eos_token": None if end is None else tokenizer.token_name(end),
        "pad_token": None,
        "special_tokens": tokenizer.special_tokens,
    }
