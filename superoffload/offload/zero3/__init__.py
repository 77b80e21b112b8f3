"""DeepSpeed's ZeRO-3 optimizer over shared memory; the only room that touches DeepSpeed's private names."""
