"""The adapter for the Hugging Face `Trainer`: the same choice, log, memory and replay as `mosaicml`, as far as that Trainer allows."""
