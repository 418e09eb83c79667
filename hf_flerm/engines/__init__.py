"""Where weights and param groups really lie: on one device, in FSDP2's shards, or in DeepSpeed's ZeRO partitions."""
