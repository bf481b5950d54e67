"""The teacher's weights, and a sharded model's parameters; imports PyTorch, the core and `config` only."""
