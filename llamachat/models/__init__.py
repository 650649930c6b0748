"""Models: loading a base or a policy, adapters, saving what plain transformers and peft load."""
