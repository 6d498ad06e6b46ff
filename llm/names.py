"""The name that a person meant: for messages about unknown settings, flags and fields."""

import difflib
from collections.abc import Collection

# What nanoGPT and Hugging Face call a setting, if the names are not alike.
_OTHER_NAMES = {
    "model.n_layer": "num_hidden_layers num_layers",
    "model.n_head": "num_attention_heads num_heads",
    "model.n_kv_head": "num_key_value_heads",
    "model.d_model": "n_embd hidden_size",
    "model.d_ff": "n_inner intermediate_size",
    "model.context_length": "block_size n_positions n_ctx max_position_embeddings",
    "model.activation": "hidden_act",
    "model.norm_epsilon": "rms_norm_eps layer_norm_eps layer_norm_epsilon",
    "optimizer.learning_rate": "lr",
    "optimizer.min_learning_rate": "min_lr",
    "optimizer.warmup_steps": "warmup_iters",
    "training.steps": "max_iters max_steps num_train_epochs",
    "training.micro_batch_size": "per_device_train_batch_size gradient_accumulation_steps",
    "training.compute_dtype": "dtype torch_dtype",
    "run.dir": "out_dir output_dir",
    "data.source": "dataset dataset_name",
}
_FOREIGN_NAMES = {name: ours for ours, names in _OTHER_NAMES.items() for name in names.split()}


def nearest(name: str, names: Collection[str]) -> str | None:
    """The one of `names` that `name` most probably means: `model.d_model` for `model.n_embd`."""
    section, _, key = name.rpartition(".")
    keys = {known.rpartition(".")[2]: known for known in reversed([*names])}
    here = [known for known in names if known.rpartition(".")[0] == section]
    foreign = difflib.get_close_matches(key, _FOREIGN_NAMES, 1, 0.85)
    candidates = [
        keys.get(key),
        _FOREIGN_NAMES.get(key),
        *difflib.get_close_matches(name, here, 1, 0.9),
        *[_FOREIGN_NAMES[one] for one in foreign],
        *[known for known in here if key and known.startswith(name)],
        *difflib.get_close_matches(name, here, 1),
        *difflib.get_close_matches(name, names, 1),
    ]
    return next((known for known in candidates if known in names), None)
