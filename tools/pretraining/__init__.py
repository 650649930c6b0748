"""How the bundled tokenizer and tiny base model are made: `llamachat pretrain`."""
