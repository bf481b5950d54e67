"""What a run is and what goes wrong in it, for people: reads a trainer.

Imports `config`, `compat`, `rollout` and `step`; the trainer, which imports this, only for its type.
"""
