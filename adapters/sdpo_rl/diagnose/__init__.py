"""What a run is and what goes wrong in it, for people: reads a trainer, and imports `config` and `compat` alone."""
