"""The models in readable torch: the VQGAN, the GPT-NeoX stack, and DOVE, whose plain forward is the oracle."""
