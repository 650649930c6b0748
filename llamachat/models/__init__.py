"""Models: loading bases and policies, adapters, and saving in formats that plain transformers and peft load."""
