"""Adapts to other libraries: TRL's releases, Unsloth's trainer, PEFT's LoRA layers, sharded generation."""
