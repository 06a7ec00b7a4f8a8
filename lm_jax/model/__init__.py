"""Models: layers and attention, the Transformer in its forms, how a model is built."""
