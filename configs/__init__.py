"""Ready-made configurations: deepspeed/ (JSON), torch/ (YAML) and models/ (Llama shapes)."""
