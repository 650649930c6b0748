"""Train the bundled tokenizer and tiny base model: `llamachat pretrain`."""
