"""The most that users of the server may ask for. It imports neither JAX nor the HTTP libraries."""

from pydantic import NonNegativeInt, PositiveInt

from llm.section import Section, setting


class Limits(Section):
    """All limits of one server; each field is a flag of `serve`."""

    max_batch: PositiveInt = setting(16, "samples computed at once, rounded up to a power of two")
    max_queue: PositiveInt = setting(256, "samples that may wait; more are answered with 429")
    max_body: PositiveInt = setting(2**20, "bytes of a request")
    max_prompts: PositiveInt = setting(64, "prompts of a request")
    max_prompt: PositiveInt = setting(
        2**15, "tokens of a prompt that is only scored, which may exceed the context"
    )
    max_n: PositiveInt = setting(16, "samples of a prompt")
    max_tokens: NonNegativeInt = setting(4096, "tokens that a request may ask for")
    max_top: NonNegativeInt = setting(100, "alternatives that a request may ask for")
