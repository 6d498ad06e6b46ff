"""The section [model]: one GPT whose parts are switches."""

from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field, NonNegativeFloat, PositiveFloat

from llm.section import Count, DropoutRate, Positive, Settings, setting


class ModelConfig(Settings):
    """One GPT whose parts are switches. The defaults are GPT-2's block."""

    n_layer: Annotated[Positive, Field(le=1024)] = setting(6, "blocks")
    n_head: Positive = setting(6, "attention heads")
    n_kv_head: Count = setting(
        0, "key/value heads: n_head is multi-head, fewer grouped-query, 1 multi-query; 0: n_head"
    )
    d_model: Annotated[Positive, Field(le=2**20)] = setting(384, "width of the residual stream")
    d_ff: Annotated[Count, Field(le=2**24)] = setting(
        0,
        "width of the MLP or of each expert; 0: 4 d_model, if gated 8/3 d_model rounded up to 64",
    )
    head_size: Count = setting(0, "width of a head, if its own (Qwen3, Gemma); 0: d_model / n_head")
    context_length: Positive = setting(256, "tokens that the model sees at once")
    window: Count = setting(0, "tokens that a token sees, itself among them (Mistral); 0: all")
    global_every: Count = setting(0, "each n-th layer has no window (Gemma); 0: all layers have it")
    positions: Literal["learned", "rotary", "none"] = setting("learned", "how positions enter")
    rotary_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = setting(
        1.0, "share of a head's features that rotary positions turn, the first ones (Pythia, Phi)"
    )
    unrotated_every: Count = setting(0, "each n-th layer has no rotary positions (SmolLM3)")
    rope_theta: PositiveFloat = setting(10000.0, "base of the rotary frequencies")
    window_rope_theta: NonNegativeFloat = setting(
        0.0, "base in layers with a window, whose frequencies are not scaled (Gemma 3); 0: the same"
    )
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = setting(
        "none",
        "frequencies for longer texts: all, or the low ones (Llama 3.1; Qwen), / rope_factor",
    )
    rope_factor: PositiveFloat = setting(1.0, "divides scaled frequencies")
    rope_original_length: Positive = setting(8192, "context before scaling, for llama3 and yarn")
    block: Literal["sequential", "parallel", "parallel_one_norm"] = setting(
        "sequential",
        "whether the MLP reads what attention wrote, or what attention reads: through a norm of "
        "its own (Pythia) or the same one (Phi)",
    )
    norm: Literal["layernorm", "rmsnorm"] = setting("layernorm", "normalisation of each sub-layer")
    norm_place: Literal["before", "after", "both"] = setting(
        "before", "what is normalised: a sub-layer's input, its output (OLMo 2), or both (Gemma 2)"
    )
    norm_epsilon: PositiveFloat = setting(1e-5, "added to the variance in a norm")
    bias: bool = setting(True, "biases in linear layers and norms")
    activation: Literal["gelu", "gelu_tanh", "relu", "relu_squared", "swiglu", "geglu"] = setting(
        "gelu_tanh",
        "of the MLP; gelu_tanh is GPT-2's, geglu gates with it (Gemma), swiglu with silu",
    )
    n_expert: Annotated[Positive, Field(le=2**16)] = setting(
        1, "MLPs that a block's router chooses from; 1: a dense model"
    )
    n_expert_active: Count = setting(
        0, "experts that a token goes through (top-k); 0: two, or the one of a dense model"
    )
    normalize_gates: bool = setting(
        True,
        "make the weights of a token's experts sum to one, as Mixtral does; false: take the "
        "router's probabilities, as Switch and OLMoE do",
    )
    qk_norm: bool = setting(False, "RMS-normalise queries and keys, head by head")
    qk_norm_joint: bool = setting(False, "with qk_norm: all heads together (OLMo 2, OLMoE)")
    dropout: DropoutRate = setting(0.0, "on embeddings, attention weights and residual branches")
    tie_embeddings: bool = setting(True, "use the token embedding as the output head")
    head_bias: bool = setting(False, "a bias of the output head, if it is not the embedding (Phi)")
    logit_soft_cap: NonNegativeFloat = setting(0.0, "c tanh(logits / c); 0: off")
    attention_soft_cap: NonNegativeFloat = setting(0.0, "c tanh(scores / c) (Gemma 2); 0: off")
    init_std: PositiveFloat = setting(0.02, "standard deviation of initial weights")
    zero_init_projections: bool = setting(
        False, "start each residual projection at zero instead of init_std / sqrt(2 n_layer)"
    )
    vocab_multiple: Annotated[Positive, Field(le=2**20)] = setting(
        64, "pad the vocabulary to a multiple of this; padding is never predicted"
    )

    @pydantic.model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.d_model % self.n_head and not self.head_size:
            nearest_multiple = max(1, round(self.d_model / self.n_head)) * self.n_head
            raise ValueError(
                f"model.d_model = {self.d_model} is not divisible by model.n_head = {self.n_head}"
                f"; the nearest that is: {nearest_multiple}"
            )
        if self.n_kv_head and self.n_head % self.n_kv_head:
            divisors = [k for k in range(1, self.n_head + 1) if self.n_head % k == 0]
            raise ValueError(
                f"model.n_head = {self.n_head} is not divisible by model.n_kv_head = "
                f"{self.n_kv_head}; it can be one of {divisors}"
            )
        size = self.head_size or self.d_model // self.n_head
        turned = int(size * self.rotary_fraction)
        if self.positions == "rotary" and (turned % 2 or not turned):
            name = "model.head_size" if self.head_size else "d_model / n_head"
            share = f", of which model.rotary_fraction = {self.rotary_fraction} is {turned}"
            raise ValueError(
                f"rotary positions need an even head size, found {name} = {size}"
                f"{share * (self.rotary_fraction != 1)}"
            )
        if self.head_bias and self.tie_embeddings:
            raise ValueError(
                "model.head_bias = true needs a head of its own; set model.tie_embeddings = false"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_experts(self) -> Self:
        active = self.n_expert_active
        if active > self.n_expert:
            dense = "; n_expert = 1 is a dense model" * (self.n_expert == 1)
            raise ValueError(
                f"model.n_expert_active = {active} is more than model.n_expert = {self.n_expert}: "
                f"a token cannot go through more experts than there are{dense}"
            )
        if active == 1 < self.n_expert and self.normalize_gates:
            raise ValueError(
                f"model.n_expert_active = 1 of model.n_expert = {self.n_expert} with "
                "model.normalize_gates = true: one weight that sums to one is always 1, and the "
                "router would not learn from it; set model.normalize_gates = false, as Switch does"
            )
        return self

    @property
    def has_experts(self) -> bool:
        return self.n_expert > 1

    @property
    def is_gated(self) -> bool:
        return self.activation in ("swiglu", "geglu")

    def resolved(self) -> Self:
        """The same model with every size that follows from another written out."""
        d_ff = 4 * self.d_model
        if self.is_gated:
            d_ff = -(-8 * self.d_model // (3 * 64)) * 64
        sizes = {
            "n_kv_head": self.n_kv_head or self.n_head,
            "head_size": self.head_size or self.d_model // self.n_head,
            "d_ff": self.d_ff or d_ff,
            "n_expert_active": self.n_expert_active or (2 if self.has_experts else 0),
        }
        return self.model_copy(update=sizes)
