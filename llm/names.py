"""The name that a person meant: for messages about unknown settings, flags and fields."""

import difflib
from collections.abc import Collection

# A line has the names of one thing: ours, of a setting with its section, and those of others.
_SYNONYMS = """
model.n_layer num_hidden_layers num_layers
model.n_head num_attention_heads num_heads
model.n_kv_head num_key_value_heads
model.head_size head_dim d_head
model.d_model n_embd hidden_size
model.d_ff n_inner intermediate_size
model.context_length block_size n_positions n_ctx max_position_embeddings seq_len seq_length
model.context_length max_seq_len max_seq_length sequence_length
model.activation hidden_act
model.norm_epsilon rms_norm_eps layer_norm_eps layer_norm_epsilon
model.dropout hidden_dropout_prob attention_dropout resid_pdrop
model.init_std initializer_range
model.window sliding_window
model.n_expert num_local_experts num_experts
model.n_expert_active num_experts_per_tok moe_top_k
optimizer.kind optim
optimizer.learning_rate lr
optimizer.min_learning_rate min_lr
optimizer.schedule lr_scheduler_type lr_scheduler scheduler decay_lr
optimizer.warmup_steps warmup_iters
optimizer.decay_steps lr_decay_iters lr_decay_steps
optimizer.grad_clip max_grad_norm clip_grad gradient_clip_val
optimizer.epsilon adam_epsilon
training.steps max_iters max_steps num_train_epochs epochs
training.micro_batch_size per_device_train_batch_size gradient_accumulation_steps
training.eval_every eval_interval eval_steps
training.compute_dtype dtype torch_dtype fp16 bf16 precision mixed_precision
training.remat gradient_checkpointing activation_checkpointing
checkpoint.every save_steps save_interval checkpoint_interval
checkpoint.keep save_total_limit
logging.every log_interval logging_steps
logging.wandb_project wandb_log
run.dir out_dir output_dir
data.workers num_workers
data.validation validation_split
data.source dataset dataset_name
data.filters.deduplicate dedup dedupe deduplication
data.filters.min_characters min_length min_chars
data.filters.redact pii
sample.max_new_tokens max_new_tokens max_tokens max_completion_tokens max_gen_toks
n num_samples num_return_sequences
stop until stop_sequences stop_strings
logprobs top_logprobs top
logprob_token_ids watch
ignore_eos ignore_eos_token
"""
_NAMES_OF = {name: line.split() for line in _SYNONYMS.splitlines() for name in line.split()}


def nearest(name: str, names: Collection[str]) -> str | None:
    """The one of `names` that `name` most probably means: `model.d_model` for `model.n_embd`.

    None if nothing is near: a wrong guess would lead to the next error.
    """
    section, _, key = name.rpartition(".")
    keys = {known.rpartition(".")[2]: known for known in reversed([*names])}
    here = {
        known.rpartition(".")[2]: known for known in names if known.rpartition(".")[0] == section
    }
    candidates = [
        keys.get(key),
        *_NAMES_OF.get(key, ()),
        # Keys without their section: what all names share would make any two of them alike.
        *[here[near] for near in difflib.get_close_matches(key, here, 1, 0.76)],
        *[
            n
            for near in difflib.get_close_matches(key, _NAMES_OF, 1, 0.85)
            for n in _NAMES_OF[near]
        ],
        *[known for known in here.values() if key and known.startswith(name)],
        *difflib.get_close_matches(name, () if here else names, 1, 0.8),
        *[keys[near] for near in difflib.get_close_matches(key, keys, 1, 0.8)],
    ]
    return next((known for known in candidates if known in names), None)
