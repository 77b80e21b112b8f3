"""Full fine-tuning of large language models on one machine with ZeRO-3 and host offload."""
