"""Full fine-tuning of language models on one machine with ZeRO-3 and host offload."""
