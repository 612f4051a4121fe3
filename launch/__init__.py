"""Commands a person runs: pretraining and its default corpus."""
