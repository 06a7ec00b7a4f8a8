"""From text to batches: sources, tokenizer, shards, packing, mixture, objectives, loader, in this order."""
