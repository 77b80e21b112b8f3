"""DeepSpeed's ZeRO-3 optimizer over shared memory; the only place that touches DeepSpeed's private names."""
