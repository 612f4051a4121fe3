"""Ready-made configurations: deepspeed/ (engine JSON files) and models/ (Llama shapes)."""
